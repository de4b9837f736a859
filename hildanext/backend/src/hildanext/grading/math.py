"""A reward for formulas: 1 for the one in the last box where a rule of `math_answers` says that it is the answer."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

from hildanext.core.config import config
from hildanext.core.errors import ConfigError, DataError
from hildanext.grading import computer_algebra
from hildanext.grading.answer_place import cut_at
from hildanext.grading.base import Reward, Scores
from hildanext.grading.math_answers import boxed, canonical, gold_answer, normalised, official, stated


@config
class MathReward(Reward):
    r"""1 for the right formula in the last `\boxed{}`, else 0.

    `official` is the data set's own rule. `canonical` knows equal numbers too and reads "The final answer is ..." where
    nothing is boxed. `math_verify` is `canonical`, else math-verify's verdict.

    Paper: MATH, arXiv:2103.03874 (the rule `official`).
    Differs: what math-verify cannot decide in time is wrong, and not left out: a model would learn to write it.
    """

    rule: Literal["official", "canonical", "math_verify"] = "canonical"

    def __post_init__(self) -> None:
        if self.rule == "math_verify" and computer_algebra.installed_version() is None:
            raise ConfigError(
                f"rule 'math_verify' without {computer_algebra.PACKAGE}",
                f"pip install {computer_algebra.PACKAGE}, or use canonical",
            )

    @cached_property
    def _algebra(self) -> computer_algebra.ComputerAlgebra:
        return computer_algebra.ComputerAlgebra()

    def check(self, problem: Mapping[str, Any]) -> None:
        """A row of MATH: `answer`, or a `solution` with a box."""
        self._gold(problem)

    def score(self, problems: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> Scores:
        """Raises `ConfigError` where math-verify is asked and cannot be started."""
        pairs = zip(problems, completions, strict=True)
        return [float(self._right(cut_at(completion), self._gold(problem))) for problem, completion in pairs]

    def _right(self, text: str, gold: str) -> bool:
        box = boxed(text)
        if self.rule == "official":
            return official(box, gold)
        answer = box if box is not None else stated(text)
        if answer is None or canonical(answer, gold):
            return answer is not None
        return self.rule == "math_verify" and self._algebra.equal(answer, gold) is True

    @staticmethod
    def _gold(problem: Mapping[str, Any]) -> str:
        gold = gold_answer(problem)
        if gold is None:
            raise DataError(
                f"a MATH row without 'answer' or a boxed 'solution': {sorted(problem)}", "give rows of MATH"
            )
        if "####" in gold:
            raise DataError(f"the answer {gold[-80:]!r} is GSM8K's, not a formula", "use the reward gsm8k")
        if not normalised(gold):
            raise DataError(f"the gold answer {gold[:80]!r} is empty", "an empty box would be right: leave the row out")
        return gold
