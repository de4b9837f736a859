"""The sums in words of `data.sources.chat.arithmetic`, as problems."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from hildanext.core.config import Seed, config
from hildanext.data.problems.base import Problem, ProblemSet, same_words
from hildanext.data.sources.base import Report
from hildanext.data.sources.chat.arithmetic import Arithmetic


@config
class ArithmeticProblems(ProblemSet):
    """Stories of `steps` additions and subtractions, judged as GSM8K is. The knobs are those of the source.

    Usually sums are held out, not other stories of a sum that is trained on.
    """

    reward: ClassVar[str | None] = "gsm8k"

    count: int = Field(default=2000, ge=1)
    largest: int = Field(default=9, ge=2)
    steps: int = Field(default=2, ge=1, le=8)
    seed: Seed = 0
    held_out_by: Literal["sum", "story"] = "sum"
    """What is held out. Of `story` a model may know the sum: what is measured is then how well it has learnt these."""

    def problems(self) -> Iterator[Problem]:
        source = Arithmetic(count=self.count, largest=self.largest, steps=self.steps, seed=self.seed)
        for record in source.records(Report()):
            story, answer = record.value["prompt"], record.value["response"]
            row = {"question": story, "answer": answer}
            identity = f"sum {answer}" if self.held_out_by == "sum" else same_words(story)
            yield Problem(record.where, record.where, story, row, identity, answer)
