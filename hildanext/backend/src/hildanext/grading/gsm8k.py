"""Is a number the answer? Every published rule for GSM8K, each a function (completion, gold) -> bool, and our own.

`gold` is the text after the row's `####`, as `gold_answer` returns it. Report `official`, `strict` and `flexible`, so
that numbers can be compared; train on `canonical`. All of them take time linear in the length of the completion.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from pydantic import Field

from hildanext.core.config import config
from hildanext.core.errors import ConfigError, DataError, UnknownChoice
from hildanext.grading.answer_place import END_OF_TEXT, cut_at
from hildanext.grading.base import Reward, Scores

STOPS = ("Question:", *END_OF_TEXT)
"""Where an answer ends: lm-evaluation-harness's stops, and the end-of-text tokens of the supported families."""

LONGEST_LINE = 4096
MOST_DIGITS = 30

_OFFICIAL = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_ANSWER_IS = re.compile(r"The answer is (-?[0-9.,]+).")
_INTEGER = re.compile(r"-?[0-9]+")
_DECIMAL = re.compile(r"-?\d+\.?\d*")
_GOLD_OF_D1 = re.compile(r"\$?([\d,]+(?:\.\d+)?)")
_SIGNED = re.compile(r"\s*+([-+]?)\s*+[$€£]?\s*+([-+]?)\s*+([0-9.,]+)")  # possessive: no backtracking over spaces
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+")


def gold_answer(answer: str) -> str:
    """The text after `####` in a row's answer. Raises `DataError` where there is none."""
    _, marker, gold = answer.rpartition("####")
    if not marker or not gold.strip():
        raise DataError(f"no '#### N' in the answer {answer[-80:]!r}", "give rows of GSM8K")
    return gold.strip()


def cut(completion: str, stops: Sequence[str] = STOPS) -> str:
    """The completion up to the first stop string, which is left out."""
    return cut_at(completion, stops)


def official(completion: str, gold: str) -> bool:
    """First `#### N` (one space); commas out; equal as strings.

    Source: openai/grade-school-math, dataset.py.
    """
    match = _OFFICIAL.search(completion)
    return match is not None and match.group(1).replace(",", "") == gold.replace(",", "")


def strict(completion: str, gold: str) -> bool:
    """lm-evaluation-harness `strict-match`: the official pattern, then `_without_marks` on both sides."""
    match = _OFFICIAL.search(completion)
    return match is not None and _without_marks(match.group(1)) == _without_marks(gold)


def flexible(completion: str, gold: str) -> bool:
    """lm-evaluation-harness `flexible-extract`: the last number anywhere. Not for training: any number scores."""
    last = ""
    for match in _FLEXIBLE.finditer(completion):
        last = match.group()
    return last != "" and _without_marks(last) == _without_marks(gold)


def _without_marks(text: str) -> str:
    """What lm-evaluation-harness ignores: `,`, `$`, all up to the last `#### `, one trailing full stop, and case."""
    text = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return text.removesuffix(".").lower()


def espo(completion: str, gold: str) -> bool:
    """`The answer is N.`, else `#### N`, else the last integer; equal as strings, commas kept.

    Source: ML-GSAI/ESPO, espo/rewards.py.
    """
    match = _ANSWER_IS.search(completion) or _OFFICIAL.search(completion)
    if match:
        return match.group(1) == gold
    last = ""
    for match in _INTEGER.finditer(completion):
        last = match.group()
    return last == gold


def d1_reward(completion: str, gold: str) -> bool:
    """The text between the last `<answer>` and the next `</answer>`, equal as a string.

    Source: dllm-reasoning/d1, reward_func.py. As there, a completion without tags is its own answer.
    """
    return completion.rpartition("<answer>")[2].partition("</answer>")[0].strip() == gold


def d1_eval(completion: str, gold: str) -> bool:
    r"""The first `\boxed{}` that holds a number, else the first `<answer>`'s last number; equal as floats.

    Source: dllm-reasoning/d1, eval/parse_and_get_acc.py and parsers.py. Its pattern for the gold answer knows no minus
    sign, so a negative one is never right.
    """
    wanted = _GOLD_OF_D1.match(gold)
    number = _boxed_number(completion)
    if number is None:
        _, opened, rest = completion.partition("<answer>")
        inside, closed, _ = rest.partition("</answer>")
        number = _float_in(inside.strip(), -1) if opened and closed else None
    return wanted is not None and number is not None and number == float(wanted.group(1).replace(",", "") or "nan")


def _boxed_number(text: str) -> float | None:
    for line in text.split("\n"):  # as in the source, a box does not span lines
        start = line.find("\\boxed{")
        while start >= 0 and (end := line.find("}", start)) >= 0:
            number = _float_in(line[start + 7 : end].strip(), 0)
            if number is not None:
                return number
            start = line.find("\\boxed{", end)
    return None


def _float_in(text: str, which: int) -> float | None:
    try:
        return float(text)
    except ValueError:
        numbers = _DECIMAL.findall(text)
        return float(numbers[which]) if numbers else None


def canonical(completion: str, gold: str) -> bool:
    """Equal as exact decimals: `#### N` with or without sign, currency, commas, decimals and spaces.

    The number is where `official` finds one, else on the line of the first `####`, so one answer is read and `official`
    implies `canonical`. What follows the number is ignored, exponents and fractions included. No tolerance; a number
    of more than 30 digits is wrong. Raises `DataError` where `gold` is not a number.
    """
    wanted = _gold_number(gold)
    match = _OFFICIAL.search(completion)
    if match:
        return _decimal_at_start(match.group(1)) == wanted
    _, marker, rest = completion.partition("####")
    line = rest.lstrip("#")[:LONGEST_LINE].partition("\n")[0]
    return bool(marker) and _decimal_at_start(line) == wanted


def _gold_number(gold: str) -> Decimal:
    wanted = _decimal_at_start(gold)
    if wanted is None:
        raise DataError(f"the gold answer {gold[:80]!r} is not a number", "give the text after '####' of a GSM8K row")
    return wanted


def _decimal_at_start(text: str) -> Decimal | None:
    match = _SIGNED.match(text.replace("\N{MINUS SIGN}", "-"))
    if not match or (match.group(1) and match.group(2)):
        return None
    number = _NUMBER.match(match.group(3).replace(",", ""))
    if not number or len(number.group()) - number.group().count(".") > MOST_DIGITS:
        return None
    return Decimal(match.group(1) + match.group(2) + number.group())


RULES: dict[str, Callable[[str, str], bool]] = {
    "official": official,
    "strict": strict,
    "flexible": flexible,
    "espo": espo,
    "d1_reward": d1_reward,
    "d1_eval": d1_eval,
    "canonical": canonical,
}


@config
class Gsm8kReward(Reward):
    """1 for the right number and `format_weight` for a well-formed last line, whatever number it holds.

    Differs: ours; `canonical` reads more spellings than any published rule (see docs/rewards.md).
    """

    rule: str = "canonical"
    format_weight: float = Field(default=0.1, ge=0, le=0.2)
    """At most a fifth of the answer's worth: beyond that the form is learnt and the answers are not."""
    stops: tuple[str, ...] = STOPS

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise UnknownChoice("GSM8K rule", self.rule, RULES)
        if self.rule == "flexible":
            raise ConfigError(
                "rule 'flexible' is no reward", "a bare number anywhere scores; use canonical, official or strict"
            )

    @property
    def highest(self) -> float:
        return 1.0 + self.format_weight

    def check(self, problem: Mapping[str, Any]) -> None:
        """A row's `answer` ends with `#### N`."""
        gold = self._gold(problem)
        if self.rule == "canonical":
            _gold_number(gold)

    def score(self, problems: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> Scores:
        """Each problem is a GSM8K row: its `answer` ends with `#### N`."""
        scores: Scores = []
        for problem, completion in zip(problems, completions, strict=True):
            text = cut(completion, self.stops)
            well_formed = text.count("####") == 1 and _OFFICIAL.search(text) is not None
            right = RULES[self.rule](text, self._gold(problem))
            scores.append(float(right) + self.format_weight * well_formed)
        return scores

    @staticmethod
    def _gold(problem: Mapping[str, Any]) -> str:
        if not isinstance(problem.get("answer"), str):
            raise DataError(f"a GSM8K row without 'answer': {sorted(problem)}", "give rows of GSM8K")
        return gold_answer(problem["answer"])
