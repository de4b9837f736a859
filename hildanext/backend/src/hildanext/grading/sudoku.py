"""4x4 Sudoku: how many of the blank cells are right. A grid is 16 digits, row by row; 0 is a blank."""

from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from itertools import permutations, product
from typing import Any, Literal

from hildanext.core.config import config
from hildanext.core.errors import DataError
from hildanext.grading.answer_place import Place, read_answer
from hildanext.grading.base import Reward, Scores

CELLS = 16


@cache
def grids() -> tuple[str, ...]:
    """All 288 full grids: every row, column and quarter holds 1 to 4 once. In order."""
    rows = ["".join(row) for row in permutations("1234")]
    halves = [upper + lower for upper, lower in product(rows, repeat=2) if set(upper[:2]) == set(lower[2:])]
    return tuple(top + bottom for top, bottom in product(halves, repeat=2) if _has_full_columns(top + bottom))


def _has_full_columns(grid: str) -> bool:
    return all(len(set(grid[column::4])) == 4 for column in range(4))


def keeps(grid: str, puzzle: str) -> bool:
    """Whether a grid has the puzzle's givens where they stand."""
    return all(given in ("0", cell) for given, cell in zip(puzzle, grid, strict=True))


@lru_cache(maxsize=4096)
def solutions(puzzle: str) -> tuple[str, ...]:
    """Every full grid that keeps the givens."""
    left = (1 << len(grids())) - 1
    for cell, digit in enumerate(puzzle):
        if digit != "0":
            left &= _with(cell, digit)
    return tuple(grid for number, grid in enumerate(grids()) if left >> number & 1) if left else ()


@cache
def _with(cell: int, digit: str) -> int:
    """Which grids have the digit in the cell: bit i is grid i."""
    return sum(1 << number for number, grid in enumerate(grids()) if grid[cell] == digit)


def share_right(grid: str, puzzle: str, solved: Sequence[str]) -> float:
    """The share of the puzzle's blanks that are as in the solution nearest to the grid; 0 where a given was changed."""
    if not keeps(grid, puzzle):
        return 0.0
    blanks = [cell for cell in range(CELLS) if puzzle[cell] == "0"]
    return max(sum(grid[cell] == solution[cell] for cell in blanks) for solution in solved) / len(blanks)


@config
class SudokuReward(Reward):
    """The share of the blank cells that are right; 0 where a given was changed, or the answer is not 16 digits.

    A problem has `puzzle`, and maybe `solution`. Spaces and line breaks between digits are not looked at.

    Paper: d1, arXiv:2504.12216 (the task and its share of blank cells).
    Differs: a quarter of d1's own test puzzles have two to four solutions; the nearest counts here, unless `solved` is
    "given". d1 fills up or cuts an answer of another length; here it is none.
    """

    solved: Literal["any", "given"] = "any"
    """Which solutions count: all that the puzzle has, or the row's `solution` alone."""
    answer: Place = "whole"

    def check(self, problem: Mapping[str, Any]) -> None:
        """A row has `puzzle`: 16 digits from 0 to 4 that can be solved, one of them 0."""
        puzzle, solution = problem.get("puzzle"), problem.get("solution")
        if not _is_grid(puzzle) or "0" not in str(puzzle) or not solutions(str(puzzle)):
            raise DataError(
                f"a Sudoku without a 'puzzle' that can be solved: {puzzle!r:.60}",
                "give 16 digits from 0 (blank) to 4 as text, row by row",
            )
        if (solution is not None or self.solved == "given") and solution not in solutions(str(puzzle)):
            raise DataError(f"the 'solution' {solution!r:.60} does not solve {puzzle}", "mend the row")

    def score(self, problems: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> Scores:
        scores: Scores = []
        for problem, completion in zip(problems, completions, strict=True):
            self.check(problem)
            puzzle = problem["puzzle"]
            solved = solutions(puzzle) if self.solved == "any" else (problem["solution"],)
            grid = "".join((read_answer(completion, self.answer) or "").split())
            scores.append(share_right(grid, puzzle, solved) if _is_grid(grid) else 0.0)
        return scores


def _is_grid(text: Any) -> bool:
    return isinstance(text, str) and len(text) == CELLS and set(text) <= set("01234")
