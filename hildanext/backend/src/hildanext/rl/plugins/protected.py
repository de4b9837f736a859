"""What of a prompt is never deleted: numbers in any form, what joins them, and how the answer is asked for."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from hildanext.detokenization import Detokenizer, special_ids

_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion half "
    "halves third thirds quarter quarters fourth fifth sixth tenth once twice thrice double triple dozen dozens pair "
    "pairs couple percent plus minus times divided sum difference product more less fewer each every per total left "
    "no not none without all"
).split()
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_PROTECTED = re.compile(rf"\d|[-+*/=^%<>()\[\]$€£×÷−]|\b(?:{'|'.join(_WORDS)})\b", re.IGNORECASE)  # noqa: RUF001
_FORMAT = re.compile(
    r"[^.!?\n]*(?:####|</?answer|\\boxed|\banswer\b|\bformat\b|\btags?\b|\brespond\b|\bstep by step\b)[^.!?\n]*[.!?]*",
    re.IGNORECASE,
)
"""A sentence that says how to answer."""


def numbers_in(text: str) -> Counter[str]:
    """The numbers that a text spells in digits, with how often."""
    return Counter(_NUMBER.findall(text))


def deletable(tokenizer: Any, ids: Sequence[int], problem: str) -> list[bool] | None:
    """Of each token of a prompt whether it may go. None where `problem` does not stand in the prompt's text, so that
    nobody can tell its tokens from those of a template.

    Kept are control tokens, what stands outside the problem, and every token that touches a digit, an operator, a
    number word or a sentence about the answer's form; and the first token, which nothing predicts.
    """
    pieces = Detokenizer(tokenizer).pieces(ids)
    text = "".join(pieces)
    begin = text.find(problem.strip())
    if begin < 0:
        return None
    kept = [(0, begin), (begin + len(problem.strip()), len(text))]
    kept += [match.span() for rule in (_PROTECTED, _FORMAT) for match in rule.finditer(text)]
    hidden, place, allowed = special_ids(tokenizer), 0, []
    for number, (token, piece) in enumerate(zip(ids, pieces, strict=True)):
        end = place + len(piece)
        touched = any(first < end and place < last for first, last in kept)
        allowed.append(number > 0 and bool(piece) and token not in hidden and not touched)
        place = end
    return allowed


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of a prompt, control tokens left out."""
    return Detokenizer(tokenizer).text(ids)
