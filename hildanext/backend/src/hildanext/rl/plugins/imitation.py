"""Texts that led to a right answer, to be learnt under the prompts that they were written to."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from hildanext.rl.batch import Answer, collate
from hildanext.rl.chunk import ToldAnswer
from hildanext.rl.material import Material
from hildanext.rl.rollouts.base import Ids


@dataclass(frozen=True)
class Lesson:
    """One text."""

    prompt: Ids
    """That it was written to, a hint included."""
    tokens: tuple[int, ...]
    """Its own, the end of text among them."""
    text: str
    about: ToldAnswer
    """The right answer that it led to, or is."""
    given: tuple[int, ...] = ()
    """Places of tokens that were known beforehand: seen, and not learnt."""


def lessons_of(lessons: Sequence[Lesson], advantage: float, block_size: int, fill: int) -> Material | None:
    """The texts as material, each a group of its own; None of none."""
    if not lessons:
        return None
    answers = [Answer(one.prompt, one.tokens, one.text, True, 0, 0, given=one.given) for one in lessons]
    told = [replace(one.about, text=one.text, tokens=len(one.tokens)) for one in lessons]
    batch = collate(answers, range(len(lessons)), block_size, fill)
    return Material(batch, told, factor=torch.full((len(lessons),), advantage, dtype=torch.float64))
