"""GSM8K: grade-school word problems."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from hildanext.core.config import config
from hildanext.core.errors import ConfigError
from hildanext.data.problems.base import FileProblems, Problem, same_words
from hildanext.data.problems.rows import name_of, text_of
from hildanext.data.sources.huggingface import HuggingFace

_ANNOTATION = re.compile(r"<<[^<>]*>>")


@config
class Gsm8kProblems(FileProblems):
    """Rows with `question` and `answer`, which ends with `#### N`; the question is the prompt.

    Paper: GSM8K, arXiv:2110.14168.
    """

    reward: ClassVar[str | None] = "gsm8k"

    path: str | tuple[str, ...] = ()
    dataset: str | None = None
    """In the place of `path`: a data set of the hub, such as openai/gsm8k."""
    subset: str | None = None
    part: str = "train"
    """Split of `dataset`: a name, or some of its rows as in `train[:1000]`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.dataset is None) == (not self.path):
            raise ConfigError(
                f"problems of gsm8k with path {self.path!r} and dataset {self.dataset!r}", "give one of the two"
            )
        if self.dataset is not None:
            self._hub(self.dataset)

    def problems(self) -> Iterator[Problem]:
        if self.dataset is None:
            yield from super().problems()
            return
        for number, row in self._hub(self.dataset).rows():
            if number == self.limit:
                return
            yield self.problem(row, f"{self.dataset} row {number + 1}")

    def test_set(self, problems: Sequence[Problem]) -> str | None:
        if self.dataset is None:
            return super().test_set(problems)
        return f"the split {self.part!r} of {self.dataset}" if "test" in self.part.lower() else None

    def _hub(self, dataset: str) -> HuggingFace:
        return HuggingFace(dataset=dataset, subset=self.subset, split=self.part)

    def problem(self, record: Mapping[str, Any], where: str) -> Problem:
        question, answer = text_of(record, "question", where), text_of(record, "answer", where)
        written = _ANNOTATION.sub("", answer)
        return Problem(name_of(record, where), where, question, record, same_words(question), written)
