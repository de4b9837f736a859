"""Does an expression of the given numbers make the target? A parser of our own, exact rationals, no `eval`."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

from pydantic import Field

from hildanext.core.config import config
from hildanext.core.errors import DataError
from hildanext.grading.answer_place import Place, read_answer
from hildanext.grading.base import Reward, Scores

LONGEST = 200
"""Characters of an expression; a longer one is no answer."""
MOST_NUMBERS = 10
LARGEST = 10**9

_TOKEN = re.compile(r" *([0-9]{1,10}|[-+*/()])", re.ASCII)
_PRIORITY = {"+": 1, "-": 1, "*": 2, "/": 2}


def tokens(text: str) -> list[str] | None:
    """Whole numbers without a sign, `+ - * /` and parentheses; None for any other text, or one that is too long.

    `**` and `//` are two operators in a row, which `value` refuses.
    """
    text = text.strip(" ")
    if len(text) > LONGEST:
        return None
    found, place = [], 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            return None
        found.append(match.group(1))
        place = match.end()
    return found


def numbers_of(found: Sequence[str]) -> list[int]:
    return [int(token) for token in found if token.isdigit()]


def value(found: Sequence[str]) -> Fraction | None:
    """The value of an expression, exactly; None where it is none, or divides by zero. Call it on numbers that are
    known: what it costs grows with their digits."""
    values: list[Fraction] = []
    for token in _postfix(found):
        if token.isdigit():
            values.append(Fraction(int(token)))
            continue
        if token not in _PRIORITY:
            return None
        right, left = values.pop(), values.pop()
        if token == "/" and right == 0:
            return None
        values.append(_apply(token, left, right))
    return values[0] if len(values) == 1 else None


def _apply(operator: str, left: Fraction, right: Fraction) -> Fraction:
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    return left * right if operator == "*" else left / right


def _postfix(found: Sequence[str]) -> Iterator[str]:
    """Operands before their operator (Dijkstra's shunting yard, without recursion); "?" where this is no expression."""
    waiting: list[str] = []
    operand_next = True
    for token in found:
        if token.isdigit() or token == "(":
            if not operand_next:
                yield "?"
                return
            if token == "(":
                waiting.append(token)
            else:
                yield token
                operand_next = False
            continue
        if operand_next:
            yield "?"
            return
        while waiting and waiting[-1] != "(" and (token == ")" or _PRIORITY[waiting[-1]] >= _PRIORITY[token]):
            yield waiting.pop()
        if token != ")":
            waiting.append(token)
            operand_next = True
        elif not waiting:
            yield "?"
            return
        else:
            waiting.pop()
    if operand_next or "(" in waiting:
        yield "?"
        return
    yield from reversed(waiting)


def judge(answer: str, numbers: Sequence[int], target: int, use: Literal["all", "some"] = "all") -> bool | None:
    """Whether an answer makes the target; None where it is no expression of these numbers."""
    found = tokens(answer)
    if not found:
        return None
    used, given = Counter(numbers_of(found)), Counter(numbers)
    if used != given if use == "all" else not used <= given:
        return None
    made = value(found)
    return None if made is None else made == target


@config
class CountdownReward(Reward):
    """1 for an expression that makes the target, `legal` for one of the given numbers that makes something else.

    A problem has `numbers` and `target`, whole numbers. Each given number stands in the expression once (`use` "all"),
    or at most once ("some").

    Paper: d1, arXiv:2504.12216 (the task and its 1 / 0.1 / 0).
    Differs: d1 evaluates the text as Python, which `9**9**9` hangs; here `**`, `//`, signs and points are refused.
    """

    legal: float = Field(default=0.1, ge=0, le=0.2)
    """At most a fifth of the answer's worth: beyond that the form is learnt and the answers are not."""
    use: Literal["all", "some"] = "all"
    answer: Place = "whole"

    def check(self, problem: Mapping[str, Any]) -> None:
        """A row has `numbers`, at most 10 whole numbers from 0 to a billion, and a whole `target`."""
        numbers, target = problem.get("numbers"), problem.get("target")
        if not isinstance(numbers, list | tuple) or not 1 <= len(numbers) <= MOST_NUMBERS:
            raise DataError(
                f"a Countdown problem without 'numbers', a list of 1 to {MOST_NUMBERS}: {numbers!r:.80}",
                'give {"numbers": [3, 5, 7], "target": 22}',
            )
        for number in (*numbers, target):
            if not isinstance(number, int) or isinstance(number, bool) or abs(number) > LARGEST:
                raise DataError(
                    f"a Countdown problem with numbers {list(numbers)!r:.80} and target {target!r:.40}",
                    f"give whole numbers of at most {LARGEST}",
                )
        if min(numbers) < 0:
            raise DataError(f"a Countdown problem with the number {min(numbers)}", "expressions have no signs")

    def score(self, problems: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> Scores:
        scores: Scores = []
        for problem, completion in zip(problems, completions, strict=True):
            self.check(problem)
            answer = read_answer(completion, self.answer)
            made = None if answer is None else judge(answer, problem["numbers"], problem["target"], self.use)
            scores.append(0.0 if made is None else 1.0 if made else self.legal)
        return scores
