"""GSM8K: grade-school word problems."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from hildanext.core.config import config
from hildanext.data.problems.base import FileProblems, Problem, same_words
from hildanext.data.problems.rows import name_of, text_of

_ANNOTATION = re.compile(r"<<[^<>]*>>")


@config
class Gsm8kProblems(FileProblems):
    """Rows with `question` and `answer`, which ends with `#### N`; the question is the prompt.

    Paper: GSM8K, arXiv:2110.14168.
    """

    reward: ClassVar[str | None] = "gsm8k"

    def problem(self, record: Mapping[str, Any], where: str) -> Problem:
        question, answer = text_of(record, "question", where), text_of(record, "answer", where)
        written = _ANNOTATION.sub("", answer)
        return Problem(name_of(record, where), where, question, record, same_words(question), written)
