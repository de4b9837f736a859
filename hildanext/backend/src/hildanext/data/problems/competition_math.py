"""MATH: competition problems, answered with a formula in a box."""

from collections.abc import Mapping
from typing import Any, ClassVar

from hildanext.core.config import config
from hildanext.data.problems.base import FileProblems, Problem, same_words
from hildanext.data.problems.rows import name_of, text_of

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


@config
class MathProblems(FileProblems):
    """Rows with `problem` and `answer`, or a `solution` that boxes it. The instruction asks for the box.

    Paper: MATH, arXiv:2103.03874.
    """

    reward: ClassVar[str | None] = "math"

    template: str = "{prompt}\n" + INSTRUCTION

    def problem(self, record: Mapping[str, Any], where: str) -> Problem:
        said = text_of(record, "problem", where)
        solution, answer = record.get("solution"), record.get("answer")
        if isinstance(solution, str) and "\\boxed" in solution:
            written: str | None = solution
        else:
            written = f"\\boxed{{{answer}}}" if isinstance(answer, str) else None
        return Problem(name_of(record, where), where, said, record, same_words(said), written)
