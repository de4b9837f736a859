"""Problems of any kind: rows with a prompt and the fields that the reward reads."""

from collections.abc import Mapping
from typing import Any

from hildanext.core.config import config
from hildanext.data.problems.base import FileProblems, Problem, same_words
from hildanext.data.problems.rows import name_of, text_of


@config
class JsonlProblems(FileProblems):
    """Each row is its own problem. The reward says what it must hold; what is missing is named with its line."""

    prompt_field: str = "prompt"
    answer_field: str | None = None
    """A right answer as a model would write it, if the rows have one: it is tried on the reward."""

    def problem(self, record: Mapping[str, Any], where: str) -> Problem:
        prompt = text_of(record, self.prompt_field, where)
        answer = None if self.answer_field is None else text_of(record, self.answer_field, where)
        return Problem(name_of(record, where), where, prompt, record, same_words(prompt), answer)
