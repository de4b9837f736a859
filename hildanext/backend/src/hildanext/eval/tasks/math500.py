r"""MATH-500: competition problems, answered with a formula in `\boxed{}`."""

from functools import cached_property
from typing import Any, ClassVar

from pydantic import Field

from hildanext.core.config import config
from hildanext.core.errors import ConfigError, DataError
from hildanext.data.problems.competition_math import INSTRUCTION
from hildanext.eval.tasks.base import Item, Judgement, Metric, WritingTask
from hildanext.eval.tasks.records import Record, Records, read_records, text_of
from hildanext.grading import computer_algebra
from hildanext.grading.math_answers import boxed, canonical, gold_answer, official, stated

MATH_VERIFY = "math_verify"

EXAMPLES: tuple[tuple[str, str], ...] = (
    (
        r"Find the domain of the expression  $\frac{\sqrt{x-2}}{\sqrt{5-x}}$.",
        r"The expressions inside each square root must be non-negative. Therefore, $x-2 \ge 0$, so $x\ge2$, and "
        r"$5 - x \ge 0$, so $x \le 5$. Also, the denominator cannot be equal to zero, so $5-x>0$, which gives $x<5$. "
        r"Therefore, the domain of the expression is $\boxed{[2,5)}$." "\n"
        r"Final Answer: The final answer is $[2,5)$. I hope it is correct.",
    ),
    (
        r"If $\det \mathbf{A} = 2$ and $\det \mathbf{B} = 12,$ then find $\det (\mathbf{A} \mathbf{B}).$",
        r"We have that $\det (\mathbf{A} \mathbf{B}) = (\det \mathbf{A})(\det \mathbf{B}) = (2)(12) = \boxed{24}.$" "\n"
        r"Final Answer: The final answer is $24$. I hope it is correct.",
    ),
    (
        r"Terrell usually lifts two 20-pound weights 12 times. If he uses two 15-pound weights instead, how many times "
        r"must Terrell lift them in order to lift the same total weight?",
        r"If Terrell lifts two 20-pound weights 12 times, he lifts a total of $2\cdot 12\cdot20=480$ pounds of "
        r"weight.  If he lifts two 15-pound weights instead for $n$ times, he will lift a total of "
        r"$2\cdot15\cdot n=30n$ pounds of weight.  Equating this to 480 pounds, we can solve for $n$:" "\n"
        r"\begin{align*}" "\n" r"30n&=480\\" "\n" r"\Rightarrow\qquad n&=480/30=\boxed{16}" "\n" r"\end{align*}" "\n"
        r"Final Answer: The final answer is $16$. I hope it is correct.",
    ),
    (
        "If the system of equations\n\n\\begin{align*}\n6x-4y&=a,\\\\\n6y-9x &=b.\n\\end{align*}has a solution "
        "$(x, y)$ where $x$ and $y$ are both nonzero,\nfind $\\frac{a}{b},$ assuming $b$ is nonzero.",
        "If we multiply the first equation by $-\\frac{3}{2}$, we obtain\n\n$$6y-9x=-\\frac{3}{2}a.$$Since we also "
        "know that $6y-9x=b$, we have\n\n$$-\\frac{3}{2}a=b\\Rightarrow\\frac{a}{b}=\\boxed{-\\frac{2}{3}}.$$\n"
        r"Final Answer: The final answer is $-\frac{2}{3}$. I hope it is correct.",
    ),
)  # fmt: skip
"""The four worked examples of Minerva (arXiv:2206.14858, appendix D; problems of the MATH data set, MIT)."""


@config
class Math500(WritingTask):
    r"""The last `\boxed{}` under three rules: the data set's own (`official`), one of equal numbers (`canonical`), and
    one that simplifies (`math_verify`, where that package is installed; its column says where it is not).

    The last two also read "The final answer is ..." where nothing is boxed. With `few_shot` 1 to 4 the prompt is
    Minerva's (as in lm-evaluation-harness's `minerva_math500`), with 0 it is the problem and an instruction, for chat
    models.

    Paper: MATH, arXiv:2103.03874; the 500 problems: arXiv:2305.20050.
    Differs: two more rules beside the published one, which stays the headline. For `official` and `canonical` equal
    formulas in different shapes are wrong (see `math_answers.py`).
    """

    metrics: ClassVar[tuple[Metric, ...]] = (Metric("official"), Metric("canonical"), Metric(MATH_VERIFY))
    hub: ClassVar[tuple[str, str | None]] = ("HuggingFaceH4/MATH-500", None)
    stops: ClassVar[tuple[str, ...]] = ("Problem:", "</s>", "<|im_end|>")

    few_shot: int = Field(default=4, ge=0, le=len(EXAMPLES))
    max_new_tokens: int = Field(default=512, ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chat and self.few_shot:
            raise ConfigError("math500: worked examples inside a chat message", "give few_shot 0 with chat")

    @cached_property
    def _algebra(self) -> computer_algebra.ComputerAlgebra:
        return computer_algebra.ComputerAlgebra()

    @cached_property
    def _records(self) -> Records:
        return read_records(self.data if self.data is not None else self.hub[0], self.split, self.hub[1])

    def items(self, limit: int | None = None) -> list[Item]:
        items = []
        for index, record in enumerate(self._records[:limit]):
            name = str(record.get("unique_id", f"math500-{index}"))
            text_of(record, "problem", name)
            items.append(Item(index, name, {**record, "answer": self._gold(record, name)}))
        return items

    def prompt(self, item: Item, shots: int) -> str:
        problem = str(item.record["problem"])
        if self.few_shot == 0:
            return f"{problem}\n{INSTRUCTION}" + ("" if self.chat else "\n")
        parts = [f"Problem:\n{example}\n\nSolution: {solution}" for example, solution in EXAMPLES[:shots]]
        return "\n\n".join([*parts, f"Problem:\n{problem}\n\nSolution:"])

    def judge(self, item: Item, text: str) -> Judgement:
        gold, box = str(item.record["answer"]), boxed(text)
        answer = box if box is not None else stated(text)
        scores = {"official": float(official(box, gold)), "canonical": float(canonical(answer, gold))}
        extraction = {"answer": answer, "boxed": box is not None, "gold": gold}
        if not self.absent():
            equal = self._algebra.equal(answer, gold)
            scores[MATH_VERIFY] = float(equal is True)  # what cannot be decided in time is wrong, as in math-verify
            extraction |= {"no_verdict": True} if equal is None else {}
        return Judgement(scores, extraction)

    def absent(self) -> dict[str, str]:
        missing = f"{computer_algebra.PACKAGE} is not installed"
        return {MATH_VERIFY: missing} if computer_algebra.installed_version() is None else {}

    def facts(self) -> dict[str, Any]:
        return {computer_algebra.PACKAGE: computer_algebra.installed_version() or "not installed"}

    def _gold(self, record: Record, name: str) -> str:
        """The `answer` column, or what the `solution` boxes."""
        answer = gold_answer(record)
        if answer is None:
            text_of(record, "solution", name)
            raise DataError(f"{name} has neither 'answer' nor a boxed solution", "give rows of MATH or MATH-500")
        return answer
