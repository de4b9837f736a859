"""HumanEval: a function from its docstring, judged by running it against the data set's tests in the sandbox."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from pydantic import Field

from hildanext.core.config import config
from hildanext.core.errors import ConfigError
from hildanext.core.statistics import pass_at_k
from hildanext.data.problems.humaneval import INSTRUCTION
from hildanext.eval.tasks.base import Item, Judgement, Metric, WritingTask
from hildanext.eval.tasks.records import Records, read_records, text_of
from hildanext.grading.code import STOPS, job_for, reward_of
from hildanext.grading.sandbox.limits import Limits
from hildanext.grading.sandbox.run import Sandbox

KS = (1, 10, 100)


@config
class HumanEval(WritingTask):
    """pass@k, estimated without bias from `repeats` samples, for every k of 1, 10, 100 up to that many.

    The prompt is the function's head as it is, and the answer ends where lm-evaluation-harness's `humaneval` ends it
    (version 1). With `chat` the prompt is its instruct task's question, and the answer's code block counts.

    Paper: Evaluating Large Language Models Trained on Code, arXiv:2107.03374.
    Differs: values, not processes, decide: the tests run apart from the program and see what it returns in plain types
    (docs/sandbox.md). In chat the harness writes the answer's beginning itself; we do not.
    """

    hub: ClassVar[tuple[str, str | None]] = ("openai/openai_humaneval", None)

    max_new_tokens: int = Field(default=512, ge=1)
    limits: Limits = Field(default_factory=Limits)
    allow_unsafe_execution: bool = False
    """Run programs where no isolation can be had: they then act as your own user."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.few_shot:
            raise ConfigError(f"humaneval with {self.few_shot} worked examples", "there are none: set few_shot to 0")

    @property
    def metrics(self) -> tuple[Metric, ...]:  # type: ignore[override]
        return tuple(Metric(f"pass@{k}") for k in KS if k <= self.repeats)

    @property
    def stops(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self.chat else STOPS

    @cached_property
    def _records(self) -> Records:
        return read_records(self.data if self.data is not None else self.hub[0], self.split)

    @cached_property
    def _sandbox(self) -> Sandbox:
        return Sandbox(self.limits, self.allow_unsafe_execution)

    def items(self, limit: int | None = None) -> list[Item]:
        """Raises `SandboxError` here, before anything is written, where programs cannot be run."""
        assert self._sandbox
        items = []
        for index, record in enumerate(self._records[:limit]):
            name = str(record.get("task_id", f"humaneval-{index}"))
            for field in ("prompt", "entry_point", "test"):
                text_of(record, field, name)
            items.append(Item(index, name, record))
        return items

    def prompt(self, item: Item, shots: int) -> str:
        text = str(item.record["prompt"])
        return INSTRUCTION.format(prompt=text.rstrip()) if self.chat else text

    def judge(self, item: Item, text: str) -> Judgement:
        verdict = self._sandbox.run(job_for(item.record, text))
        extraction = {
            "verdict": verdict.kind,
            "detail": verdict.detail,
            "seconds": verdict.seconds,
            "calls": verdict.calls,
        }
        return Judgement({"pass@1": reward_of(verdict)}, extraction)

    def values(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
        """Each k for which enough samples could be judged."""
        judged = [score for sample in samples if (score := sample["scores"].get("pass@1")) is not None]
        ks = [k for k in KS if k <= len(judged)]
        return {f"pass@{k}": (pass_at_k(len(judged), int(sum(judged)), k), 1.0) for k in ks}

    def details(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """How many programs ended how."""
        ends = Counter(sample["extraction"].get("verdict", "unknown") for sample in samples)
        return {kind: float(count) for kind, count in sorted(ends.items())}

    def facts(self) -> dict[str, Any]:
        return {"sandbox": self._sandbox.isolation.describe()}
