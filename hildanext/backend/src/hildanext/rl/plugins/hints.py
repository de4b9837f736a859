"""Tokens of a right answer that may be said beforehand: none of the final answer, wherever that stands in the text."""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch

from hildanext.core.errors import ConfigError
from hildanext.core.runtime import make_generator
from hildanext.data.problems import Problem
from hildanext.detokenization import Detokenizer
from hildanext.grading.answer_place import CLOSING, MARKER, OPENING

PLACES = (MARKER, OPENING, "\\boxed{")
"""What a final answer stands behind."""


def hinted(tokenizer: Any, problem: Problem, share: float, seed: int) -> list[tuple[int, int]]:
    """Places and tokens: floor(share x tokens) of the right answer's, at random among those that may be said.

    Raises `ConfigError` for a problem without a right answer, or one whose right answer is all final answer.
    """
    if problem.answer is None:
        raise ConfigError(f"stp.hints are out of right answers, and {problem.where} has none", "leave hints out")
    ids = tokenizer(problem.answer, add_special_tokens=False).input_ids
    allowed = sayable(tokenizer, ids)
    if allowed is None:
        raise ConfigError(
            f"stp.hints cover the answer's span: {problem.answer!r:.60} of {problem.where} marks no final answer",
            f"take problems whose right answers have one of {', '.join(PLACES)}, or leave hints out",
        )
    count = min(math.floor(share * len(ids)), len(allowed))
    order = torch.randperm(len(allowed), generator=make_generator(seed))[:count]
    return [(allowed[number], ids[allowed[number]]) for number in sorted(order.tolist())]


def sayable(tokenizer: Any, ids: Sequence[int]) -> list[int] | None:
    """Places of a right answer's tokens that hold nothing of the final answer; None where none is marked.

    Kept back are the final answer, all behind it, and every other place of the text where it stands by itself.
    """
    pieces = Detokenizer(tokenizer).pieces(ids)
    text = "".join(pieces)
    begin = max((text.find(mark) + len(mark) for mark in PLACES if mark in text), default=-1)
    if begin < 0:
        return None
    final = re.split(rf"\n|{re.escape(CLOSING)}|\}}", text[begin:].strip(), maxsplit=1)[0].strip()
    end = begin + len(text[begin:]) - len(text[begin:].lstrip())
    hidden = [(end, len(text))]
    if final:
        hidden += [match.span() for match in re.finditer(rf"(?<!\w){re.escape(final)}(?!\w)", text[:begin])]
    allowed, place = [], 0
    for number, piece in enumerate(pieces):
        after = place + len(piece)
        if piece and not any(first < after and place < last for first, last in hidden):
            allowed.append(number)
        place = after
    return allowed
