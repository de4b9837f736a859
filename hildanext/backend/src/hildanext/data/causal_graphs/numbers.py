"""Numbers in text, exactly: numerals, number words and arithmetic as rationals. Nothing is evaluated as code."""

import re
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

NUMERAL = re.compile(r"\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\d)\.\d+")
"""12, 1,234.5, .5; never a sign, a currency or a percent sign."""

LONGEST = 40
"""Characters of a numeral beyond which a text is no arithmetic; four times as many marks make no expression either."""

_ONES = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
).split()
_TENS = "thirty forty fifty sixty seventy eighty ninety".split()

NUMBER_WORDS: dict[str, Fraction] = {
    **{word: Fraction(value) for value, word in enumerate(_ONES, start=1)},
    **{word: Fraction(10 * value) for value, word in enumerate(_TENS, start=3)},
    "dozen": Fraction(12),
    "half": Fraction(1, 2),
    "third": Fraction(1, 3),
    "quarter": Fraction(1, 4),
    "twice": Fraction(2),
    "double": Fraction(2),
    "triple": Fraction(3),
}
"""Whole lower-case words only: "thirds" and "doubled" are left to the constants, as in the measured extraction."""


class Number(NamedTuple):
    """A value and the characters that say it."""

    value: Fraction
    start: int
    end: int


@lru_cache(maxsize=1 << 14)
def number(text: str) -> Fraction:
    """The exact value of a numeral; `text` must match `NUMERAL`."""
    return Fraction(text.replace(",", ""))


def numerals(text: str, start: int = 0, end: int | None = None) -> Iterator[Number]:
    """The numerals that lie inside characters `start` to `end`, in reading order."""
    for match in NUMERAL.finditer(text, start, len(text) if end is None else end):
        if len(match.group()) <= LONGEST:
            yield Number(number(match.group()), match.start(), match.end())


def number_words(text: str) -> Iterator[Number]:
    """The words of the lexicon in reading order; "twenty-five" is its two words."""
    for match in re.finditer(r"[A-Za-z]+", text):
        value = NUMBER_WORDS.get(match.group().lower())
        if value is not None:
            yield Number(value, match.start(), match.end())


def written(value: Fraction) -> str:
    """A value as people write it: 24, 0.2, and 1/3 where no short decimal is exact."""
    if value.denominator == 1:
        return str(value.numerator)
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return repr(float(value)) if rest == 1 and value.denominator <= 10**6 else str(value)


_TOKEN = re.compile(rf"\s*(?:(?P<number>{NUMERAL.pattern})|(?P<mark>//|[-+*/()x×÷%]))")
_SAME = {"x": "*", "×": "*", "÷": "/", "//": "/"}


def evaluate(expression: str) -> Fraction | None:
    """The exact value of numbers joined by + - * / (also x × ÷ //), brackets and %; None for anything else or n/0."""
    marks: list[Fraction | str] = []
    at = 0
    text = expression.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None or len(match[0]) > LONGEST or len(marks) > 4 * LONGEST:
            return None
        mark = match["mark"]
        marks.append(_SAME.get(mark, mark) if mark else number(match["number"]))
        at = match.end()
    try:
        value, rest = _sum(marks, 0)
    except (ZeroDivisionError, _Broken):
        return None
    return value if rest == len(marks) else None


class _Broken(ValueError):
    """The expression breaks off or holds something out of place."""


def _sum(marks: list[Fraction | str], at: int) -> tuple[Fraction, int]:
    value, at = _product(marks, at)
    while at < len(marks) and marks[at] in ("+", "-"):
        right, after = _product(marks, at + 1)
        value, at = (value + right if marks[at] == "+" else value - right), after
    return value, at


def _product(marks: list[Fraction | str], at: int) -> tuple[Fraction, int]:
    value, at = _atom(marks, at)
    while at < len(marks) and marks[at] in ("*", "/"):
        right, after = _atom(marks, at + 1)
        value, at = (value * right if marks[at] == "*" else value / right), after
    return value, at


def _atom(marks: list[Fraction | str], at: int) -> tuple[Fraction, int]:
    if at >= len(marks):
        raise _Broken
    mark = marks[at]
    if isinstance(mark, Fraction):
        per_cent = marks[at + 1 : at + 2] == ["%"]
        return (mark / 100, at + 2) if per_cent else (mark, at + 1)
    if mark in ("+", "-"):
        value, at = _atom(marks, at + 1)
        return (-value if mark == "-" else value), at
    if mark == "(":
        value, at = _sum(marks, at + 1)
        if at < len(marks) and marks[at] == ")":
            return value, at + 1
    raise _Broken
