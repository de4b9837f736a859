"""What a round may learn from: answers as arrays, and what is said of each beside its text."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from hildanext.rl.batch import RolloutBatch
from hildanext.rl.chunk import ToldAnswer
from hildanext.rl.looks import Look

Prompts = tuple[tuple[int, ...] | None, ...]


@dataclass(frozen=True)
class Material:
    """Row i of everything is answer i. Whole groups; the rows of a group need not stand together.

    What is None is as without plugins: every token that was sampled counts, every advantage is as it is, every answer
    was written under its own prompt, and the likelihood draws the looks.
    """

    batch: RolloutBatch
    answers: list[ToldAnswer]
    credited: Bool[Tensor, "rows positions"] | None = None
    """Tokens that may carry a gradient; the others are seen, as a prompt's are."""
    factor: Float[Tensor, " rows"] | None = None
    """Of each advantage."""
    asked: Prompts | None = None
    """The prompt that an answer was written under, where that is not the one it is learnt under."""
    look: Look | None = None
    """One look at each row, instead of those that are drawn."""
    lessons: "Material | None" = None
    """Texts under prompts of their own that are made likelier whatever the groups earn: each a group of one, its
    `factor` the advantage."""
    figures: dict[str, float] = field(default_factory=dict)
    """Counts for the round's line of metrics; the same names for every chunk."""

    def rows(self, chosen: Sequence[int]) -> "Material":
        """Some of the answers, in the order given; figures stay, lessons do not."""
        width = self.batch.tokens.shape[1]
        index = torch.tensor(list(chosen), dtype=torch.long)
        return replace(
            self,
            batch=widened(self.batch.rows(chosen), width),
            answers=[self.answers[row] for row in chosen],
            credited=None if self.credited is None else self.credited[index],
            factor=None if self.factor is None else self.factor[index],
            asked=None if self.asked is None else tuple(self.asked[row] for row in chosen),
            look=None if self.look is None else self.look.rows(list(chosen), width),
            lessons=None,
        )

    def with_lessons(self, first: int) -> "Material":
        """The answers, then the lessons, which are groups from number `first` on."""
        if self.lessons is None:
            return self
        count = len(self.lessons.answers)
        batch = replace(self.lessons.batch, group=torch.arange(first, first + count))
        answers = [replace(answer, group=first + number) for number, answer in enumerate(self.lessons.answers)]
        return Material.join([replace(self, lessons=None), replace(self.lessons, batch=batch, answers=answers)])

    @classmethod
    def join(cls, parts: "Sequence[Material]") -> "Material":
        """The answers of several, one after another. Looks are in all of them or in none."""
        batch = RolloutBatch.join([part.batch for part in parts])
        width = batch.tokens.shape[1]
        lessons = [part.lessons for part in parts if part.lessons is not None]
        figures: dict[str, float] = {}
        for part in parts:
            for name, value in part.figures.items():
                figures[name] = figures.get(name, 0.0) + value
        return cls(
            batch,
            [answer for part in parts for answer in part.answers],
            _joined([part.credited for part in parts], [part.batch.tokens for part in parts], width),
            _factors(parts),
            _prompts(parts),
            _looks([part.look for part in parts], width),
            cls.join(lessons) if lessons else None,
            figures,
        )


def widened(batch: RolloutBatch, width: int) -> RolloutBatch:
    """The batch with filling up to `width` positions."""
    missing = width - batch.tokens.shape[1]
    filling = {"document": -1, "step": -1}
    parts: dict[str, Any] = {
        name: pad(array, (0, missing), value=filling.get(name, 0))
        for name, array in batch.arrays().items()
        if name != "edits" and array.ndim == 2
    }
    return replace(batch, **parts) if missing else batch


def _joined(
    parts: Sequence[Tensor | None], tokens: Sequence[Tensor], width: int
) -> Bool[Tensor, "rows positions"] | None:
    if all(part is None for part in parts):
        return None
    whole = [
        torch.ones(text.shape, dtype=torch.bool) if part is None else part
        for part, text in zip(parts, tokens, strict=True)
    ]
    return torch.cat([pad(part, (0, width - part.shape[1]), value=True) for part in whole])


def _factors(parts: Sequence[Material]) -> Float[Tensor, " rows"] | None:
    if all(part.factor is None for part in parts):
        return None
    ones = [torch.ones(len(part.answers), dtype=torch.float64) for part in parts]
    return torch.cat([one if part.factor is None else part.factor for part, one in zip(parts, ones, strict=True)])


def _prompts(parts: Sequence[Material]) -> Prompts | None:
    if all(part.asked is None for part in parts):
        return None
    return tuple(
        prompt for part in parts for prompt in (part.asked if part.asked is not None else (None,) * len(part.answers))
    )


def _looks(looks: Sequence[Look | None], width: int) -> Look | None:
    there = [look for look in looks if look is not None]
    if not there:
        return None
    assert len(there) == len(looks), "a look at some answers and none at others"
    wide: dict[str, Any] = {
        name: torch.cat([pad(getattr(look, name), (0, width - look.masked.shape[1])) for look in there])
        for name in ("masked", "read", "weight", "shown", "labels")
        if getattr(there[0], name) is not None
    }
    return replace(there[0], **wide)
