"""Where a wrong answer goes wrong, as its task's own rules see it: the first fault, and what to say about it."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from hildanext.grading import countdown, sudoku
from hildanext.grading.answer_place import CLOSING, MARKER, OPENING, cut_at
from hildanext.grading.base import Reward
from hildanext.grading.countdown import CountdownReward
from hildanext.grading.gsm8k import Gsm8kReward
from hildanext.grading.sudoku import SudokuReward


@dataclass(frozen=True)
class Fault:
    """Characters of an answer's text, and a hint for whoever tries again."""

    begin: int
    end: int
    hint: str


_EQUATION = re.compile(r"([0-9][0-9 ().,+*/$×÷−-]*[0-9)])\s*=\s*\$?\s*(-?[0-9][0-9,]*(?:\.[0-9]+)?)")  # noqa: RUF001
_LIKE = str.maketrans({"×": "*", "÷": "/", "−": "-", ",": None, "$": None})  # noqa: RUF001
_PLACES = 12
"""Digits of a number that are computed with; a longer one is not looked at."""


def equation_fault(row: Mapping[str, Any], text: str) -> Fault:
    """The first equation of an answer that does not hold; the last line's answer where all of them do."""
    for match in _EQUATION.finditer(text):
        left, right = match.group(1).translate(_LIKE), match.group(2).translate(_LIKE)
        value = _value(left)
        if value is not None and len(right) <= _PLACES and abs(value - Fraction(right)) > Fraction(1, 100):
            said = match.group().strip()
            return Fault(match.start(), match.end(), f"Check this step again, it does not hold: {said}")
    return _final(text, "Every step holds, but the answer is wrong: think again about what is asked.")


def _value(left: str) -> Fraction | None:
    """Of an expression whose numbers may have a point."""
    numbers = re.findall(r"[0-9]+(?:\.[0-9]+)?", left)
    if any(len(number) > _PLACES for number in numbers):
        return None
    found = countdown.tokens(re.sub(r"[0-9]+(?:\.[0-9]+)?", "1", left).strip())
    if found is None or not found:
        return None
    scale = 10 ** max((len(number.partition(".")[2]) for number in numbers), default=0)
    whole = iter(numbers)
    put = [f"({int(Fraction(next(whole)) * scale)}/{scale})" if token == "1" else token for token in found]
    parsed = countdown.tokens("".join(put)[: countdown.LONGEST])
    return None if parsed is None else countdown.value(parsed)


def number_fault(row: Mapping[str, Any], text: str) -> Fault:
    """The first number of an expression that was not given, or not so often; the whole expression where all were."""
    left = Counter(int(number) for number in row["numbers"])
    begin, end = _answer_span(text)
    for match in re.finditer(r"[0-9]+", text[begin:end]):
        number = int(match.group()) if len(match.group()) <= _PLACES else -1
        if left[number] == 0:
            where = begin + match.start()
            return Fault(
                where, begin + match.end(), f"{match.group()} may not be used there; use each given number once."
            )
        left[number] -= 1
    return _final(text, f"The expression does not make {row['target']}: try another one.")


def cell_fault(row: Mapping[str, Any], text: str) -> Fault:
    """The first cell that changes a given, or holds what its row, column or quarter holds already; the whole grid where
    there is none."""
    begin, end = _answer_span(text)
    digits = [(begin + match.start(), match.group()) for match in re.finditer(r"[0-9]", text[begin:end])]
    puzzle, seen = str(row["puzzle"]), list[str]()
    for cell, (where, digit) in enumerate(digits[: sudoku.CELLS]):
        given = puzzle[cell]
        clash = any(seen[other] == digit and _same_house(cell, other) for other in range(cell))
        if digit not in "1234" or clash or given not in ("0", digit):
            place = f"row {cell // 4 + 1}, column {cell % 4 + 1}"
            return Fault(where, where + 1, f"The digit at {place} cannot be {digit}.")
        seen.append(digit)
    return _final(text, "The grid is not a solution: try again.")


def _same_house(one: int, other: int) -> bool:
    (row, column), (row_too, column_too) = divmod(one, 4), divmod(other, 4)
    return row == row_too or column == column_too or (row // 2, column // 2) == (row_too // 2, column_too // 2)


def _answer_span(text: str) -> tuple[int, int]:
    """Where the final answer stands: behind the marker on its line, between the tags, or everywhere."""
    text = cut_at(text)
    if MARKER in text:
        begin = text.find(MARKER) + len(MARKER)
        line = text.find("\n", begin)
        return begin, len(text) if line < 0 else line
    if OPENING in text:
        begin = text.find(OPENING) + len(OPENING)
        close = text.find(CLOSING, begin)
        return begin, len(text) if close < 0 else close
    return 0, len(text)


def _final(text: str, hint: str) -> Fault:
    """All of the answer is to be made again: no part of it was found at fault."""
    return Fault(0, max(len(text), 1), hint)


Verifier = Callable[[Mapping[str, Any], str], Fault]

VERIFIERS: dict[type[Reward], Verifier] = {
    Gsm8kReward: equation_fault,
    CountdownReward: number_fault,
    SudokuReward: cell_fault,
}
"""By the reward that judges the answers."""
