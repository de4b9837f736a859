"""4x4 Sudoku, made on the spot: a full grid with cells taken out."""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from pydantic import Field

from hildanext.core.config import Seed, config
from hildanext.core.errors import ConfigError
from hildanext.data.problems.base import Problem, ProblemSet
from hildanext.data.problems.puzzle_texts import sudoku_prompt, written
from hildanext.grading.answer_place import Place
from hildanext.grading.sudoku import CELLS, grids, solutions

ATTEMPTS = 1000


@config
class SudokuProblems(ProblemSet):
    """`count` puzzles of `blanks` blank cells and one solution each; puzzle i depends on (seed, i) and `blanks` alone.

    There are 288 full grids. Held out are grids, not other blanks of a grid that is trained on.

    Paper: d1, arXiv:2504.12216 (the task).
    Differs: one solution each, where a quarter of d1's test puzzles have several.
    """

    reward: ClassVar[str | None] = "sudoku"

    count: int = Field(default=2000, ge=1)
    blanks: int = Field(default=6, ge=1, le=12)
    """With 12, four cells are given, the fewest that leave one solution."""
    seed: Seed = 0
    answer: Place = "whole"
    """Where the prompt asks for the answer; the reward's `answer` must be the same."""

    def problems(self) -> Iterator[Problem]:
        for number in range(self.count):
            draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, number])))
            where = f"sudoku {number + 1}"
            solution, puzzle = self._drawn(draw, where)
            row = {"puzzle": puzzle, "solution": solution}
            prompt = sudoku_prompt(puzzle, self.answer)
            yield Problem(where, where, prompt, row, f"sudoku {solution}", written(solution, self.answer))

    def _drawn(self, draw: np.random.Generator, where: str) -> tuple[str, str]:
        for _ in range(ATTEMPTS):
            solution = grids()[int(draw.integers(len(grids())))]
            blank = set(draw.permutation(CELLS)[: self.blanks].tolist())
            puzzle = "".join("0" if cell in blank else digit for cell, digit in enumerate(solution))
            if len(solutions(puzzle)) == 1:
                return solution, puzzle
        raise ConfigError(f"{where}: no puzzle of one solution in {ATTEMPTS} attempts", "lower blanks")
