"""4x4 Sudoku out of files: d1's CSV, or JSON lines."""

from collections.abc import Mapping
from typing import Any, ClassVar

from hildanext.core.config import config
from hildanext.data.problems.base import FileProblems, Problem
from hildanext.data.problems.puzzle_texts import sudoku_prompt, written
from hildanext.data.problems.rows import name_of, text_of
from hildanext.grading.answer_place import Place


@config
class SudokuFiles(FileProblems):
    """Rows with `puzzle` and maybe `solution`, 16 digits each; CSV under such a header, in small letters or large.

    Held out are solutions, where rows have them, not other blanks of a grid that is trained on.

    Paper: d1, arXiv:2504.12216 (its file).
    """

    reward: ClassVar[str | None] = "sudoku"

    answer: Place = "whole"
    """Where the prompt asks for the answer; the reward's `answer` must be the same."""

    def problem(self, record: Mapping[str, Any], where: str) -> Problem:
        puzzle, solution = text_of(record, "puzzle", where), record.get("solution")
        row = {"puzzle": puzzle} if solution is None else {"puzzle": puzzle, "solution": solution}
        prompt = sudoku_prompt(puzzle, self.answer)
        identity = f"sudoku {solution if isinstance(solution, str) else puzzle}"
        answer = written(solution, self.answer) if isinstance(solution, str) else None
        return Problem(name_of(record, where), where, prompt, row, identity, answer)
