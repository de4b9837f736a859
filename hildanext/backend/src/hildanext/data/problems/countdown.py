"""Countdown, made on the spot: numbers to combine into a target that can be reached."""

from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from hildanext.core.config import Seed, config
from hildanext.core.errors import ConfigError
from hildanext.data.problems.base import Problem, ProblemSet
from hildanext.data.problems.puzzle_texts import countdown_identity, countdown_prompt, written
from hildanext.grading.answer_place import Place
from hildanext.grading.countdown import LARGEST, MOST_NUMBERS

ATTEMPTS = 1000
PRIORITY = {"+": 1, "-": 1, "*": 2, "/": 2}

Term = tuple[str, int, int]
"""An expression, its value, and how tightly its last operator binds."""


@config
class CountdownProblems(ProblemSet):
    """`count` problems of `numbers` numbers from `smallest` to `largest`; problem i depends on (seed, i) and the
    knobs below `count` alone.

    The target is what a random expression of all the numbers makes, with whole positive numbers on the way.

    Paper: d1, arXiv:2504.12216 (the task).
    """

    reward: ClassVar[str | None] = "countdown"

    count: int = Field(default=2000, ge=1)
    numbers: int = Field(default=3, ge=2, le=MOST_NUMBERS)
    smallest: int = Field(default=1, ge=1)
    largest: int = Field(default=9, ge=1, le=LARGEST)
    largest_target: int = Field(default=100, ge=1, le=LARGEST)
    operations: tuple[Literal["+", "-", "*", "/"], ...] = Field(default=("+", "-", "*", "/"), min_length=1)
    seed: Seed = 0
    answer: Place = "whole"
    """Where the prompt asks for the answer; the reward's `answer` must be the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.smallest > self.largest:
            raise ConfigError(f"smallest {self.smallest} above largest {self.largest}", "give a range")

    def problems(self) -> Iterator[Problem]:
        for number in range(self.count):
            draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, number])))
            where = f"countdown {number + 1}"
            for _ in range(ATTEMPTS):
                numbers = [int(value) for value in draw.integers(self.smallest, self.largest + 1, self.numbers)]
                term = self._combined(draw, numbers)
                if term is not None and term[1] <= self.largest_target:
                    break
            else:
                raise ConfigError(
                    f"{where}: no target up to {self.largest_target} in {ATTEMPTS} attempts",
                    "raise largest_target, or allow more operations",
                )
            expression, target, _ = term
            prompt = countdown_prompt(numbers, target, self.answer)
            row = {"numbers": numbers, "target": target}
            identity = countdown_identity(numbers, target)
            yield Problem(where, where, prompt, row, identity, written(expression, self.answer))

    def _combined(self, draw: np.random.Generator, numbers: list[int]) -> Term | None:
        """All the numbers in one expression; None where a draw led nowhere."""
        terms: list[Term] = [(str(number), number, 3) for number in numbers]
        while len(terms) > 1:
            first, second = draw.choice(len(terms), 2, replace=False)
            joined = _join(terms[first], self.operations[int(draw.integers(len(self.operations)))], terms[second])
            if joined is None:
                return None
            terms = [term for index, term in enumerate(terms) if index not in (first, second)] + [joined]
        return terms[0]


def _join(left: Term, operator: str, right: Term) -> Term | None:
    """None where the result is no whole positive number, or far too large."""
    if operator == "/" and left[1] % right[1]:
        return None
    made = {
        "+": left[1] + right[1],
        "-": left[1] - right[1],
        "*": left[1] * right[1],
        "/": left[1] // right[1],
    }[operator]
    if not 0 < made <= LARGEST:
        return None
    binds = PRIORITY[operator]
    before = left[0] if left[2] >= binds else f"({left[0]})"
    after = right[0] if right[2] > binds or (right[2] == binds and operator in "+*") else f"({right[0]})"
    return f"{before}{operator}{after}", made, binds
