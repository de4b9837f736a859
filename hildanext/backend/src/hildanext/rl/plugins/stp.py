"""STP: some tokens are known beforehand, and a block's last steps are taken at once."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.core.errors import ConfigError
from hildanext.detokenization import Detokenizer
from hildanext.diffusion import block_index
from hildanext.rl.batch import RolloutBatch
from hildanext.rl.desk import Ask, Desk
from hildanext.rl.looks import Look
from hildanext.rl.material import Material
from hildanext.rl.plugins.base import Around, Plugin
from hildanext.rl.plugins.hints import PLACES, hinted


@config
class Stp(Plugin):
    """`template`, `end_at` and `hints` prune in space, `temporal` in time.

    Spatial: every answer begins with the template's tokens, and its end of text stands at `end_at`. These are never
    sampled, never masked in a look, carry no gradient and are not counted in an answer's length: the same set for every
    policy, since it is part of the rollouts. What is given never covers a final answer: `check` refuses a template that
    would, and `more` an answer in which it did.

    Hints are tokens of the right answer that the data hold, at the places where they stand there, drawn for each
    problem of a round, the same for all its answers. None is of the final answer, wherever that stands in the text. The
    share falls to 0 over `hint_rounds`, since nobody gives hints when answers are measured.

    Temporal: rollouts are written by the decoder `pruned`, which makes up for a block's last steps in one. A likelihood
    of actions replays them as they were. For a bound, no block is seen with fewer masks (but for none) than its last
    step wrote: more are added until there are as many, each look's weights over them staying those of that number of
    masks, (n+1)/k. So the mean is that of the steps that were made, the last one's tokens read as the one action that
    they are.

    Measured answers (held out) are written without either.

    Paper: STP, arXiv:2602.08905, as far as its abstract and a summary say.
    Differs: a reconstruction: neither its code nor its full text could be had. That hints are tokens of the right
    answer, at random, fewer from round to round, is ours.
    """

    template: str = ""
    """Text that every answer begins with, such as `#### `; none is off."""
    end_at: int | None = Field(default=None, ge=1)
    """Place in the answer, in tokens, where its end of text stands, unless one comes before it."""
    hints: float = Field(default=0.0, ge=0, lt=1, allow_inf_nan=False)
    """Share of a right answer's tokens, but for the final answer's, that is given in the first round; 0 is off."""
    hint_rounds: int = Field(default=100, ge=1)
    """Rounds over which that share falls to 0, by the same amount each."""
    temporal: Literal["off", "planned", "sure"] = "planned"
    """Whether the last steps are left out, as many as planned or from a confidence on."""
    share: float = Field(default=0.25, gt=0, lt=1, allow_inf_nan=False)
    """Of a block's steps that `planned` leaves out."""
    confidence: float = Field(default=0.95, gt=0, le=1, allow_inf_nan=False)
    """Of the likeliest token of every mask that is left, for `sure`."""

    def __post_init__(self) -> None:
        if not self.template and self.end_at is None and not self.hints and self.temporal == "off":
            raise ConfigError("stp prunes nothing", "give template, end_at, hints or temporal, or leave the plugin out")
        if self.template and self.hints:
            raise ConfigError(
                f"stp has template {self.template!r} and hints, which are tokens of the same places",
                "give one of the two",
            )
        said = max((self.template.rfind(place) + len(place) for place in PLACES if place in self.template), default=-1)
        if said >= 0 and self.template[said:].strip():
            raise ConfigError(
                f"stp.template {self.template!r} covers the answer's span: {self.template[said:].strip()!r} stands "
                "where the final answer does",
                "end the template where the final answer begins",
            )

    def check(self, around: Around) -> None:
        if not around.rollouts.fills:
            raise ConfigError("stp shapes how answers are written, which these rollouts cannot", "take rollouts engine")
        if self.temporal != "off":
            self._check_temporal(around)
        if (self.template or self.hints) and getattr(around.reward, "answer", "marker") == "whole":
            what = f"template {self.template!r} covers" if self.template else f"hints {self.hints:g} cover"
            raise ConfigError(
                f"stp.{what} the answer's span: for this reward the whole text is one",
                "set the reward's (and the problems') answer to marker or tags, or leave that out",
            )

    def _check_temporal(self, around: Around) -> None:
        if getattr(around.rollouts, "decoder", None) is not None:
            raise ConfigError(
                "stp.temporal stops the decoder ordered, and rollouts.decoder names another",
                "leave rollouts.decoder out, or set stp.temporal to off",
            )
        if type(around.likelihood).__name__ == "LeftToRight":
            raise ConfigError(
                "stp.temporal writes a block's last tokens at once, and left_to_right reads one after another",
                "take trajectory or block_elbo, or set stp.temporal to off",
            )

    def ask(self, ask: Ask, desk: Desk) -> Ask:
        given = dict(self._given(desk))
        if self.hints and desk.round < self.hint_rounds:
            share = self.hints * (1 - desk.round / self.hint_rounds)
            seed = desk.seed_for(ask.group, "stp hints")
            given |= dict(hinted(desk.policy.tokenizer, ask.problem, share, seed))
        given |= dict(ask.wish.given)
        inside = tuple((place, token) for place, token in sorted(given.items()) if place < desk.rollouts.max_new_tokens)
        decoder = dict(ask.wish.decoder)
        if self.temporal != "off":
            decoder |= {"name": "pruned"}
            decoder |= {"early": self.share} if self.temporal == "planned" else {"sure": self.confidence}
        return replace(ask, wish=replace(ask.wish, given=inside, decoder=decoder))

    def more(self, material: Material, desk: Desk) -> Material:
        if self.template:
            count = len(desk.policy.tokenizer(self.template, add_special_tokens=False).input_ids)
            for row in range(len(material.answers)):
                check_span(desk.policy.tokenizer, material.batch, row, count)
        if self.hints:
            batch = material.batch
            answering = (batch.document >= 0) & (batch.position >= batch.prompt[:, None])
            given = float((answering & ~batch.open).sum())
            return replace(material, figures={**material.figures, "stp_given": given})
        return material

    def _given(self, desk: Desk) -> list[tuple[int, int]]:
        tokenizer = desk.policy.tokenizer
        ids = tokenizer(self.template, add_special_tokens=False).input_ids if self.template else []
        if self.end_at is not None and self.end_at < len(ids):
            raise ConfigError(
                f"stp.end_at {self.end_at} lies inside the template, which has {len(ids)} tokens", "raise end_at"
            )
        return [*enumerate(ids), *([(self.end_at, desk.policy.end)] if self.end_at is not None else [])]

    def looks(
        self, batch: RolloutBatch, looks: Sequence[Look], of_actions: bool, generator: torch.Generator
    ) -> list[Look]:
        if self.temporal == "off" or of_actions:
            return list(looks)
        return [raised(look, batch, generator) for look in looks]


def check_span(tokenizer: Any, batch: RolloutBatch, row: int, given: int) -> None:
    """The final answer begins behind the first `given` tokens. Fails as an assertion."""
    first = int(batch.prompt[row])
    tokens = batch.tokens[row, first:][batch.document[row, first:] >= 0].tolist()
    pieces = Detokenizer(tokenizer, batch.tokens[row, :first].tolist()).pieces(tokens)
    text, fixed = "".join(pieces), "".join(pieces[:given])
    place = max((text.find(mark) + len(mark) for mark in PLACES if mark in text), default=len(text))
    begin = len(text) - len(text[place:].lstrip())
    assert begin >= len(fixed.rstrip()), f"stp gave {fixed!r}, which covers the final answer of {text!r}"


def last_step_counts(batch: RolloutBatch, block: Int[Tensor, "rows positions"]) -> Int[Tensor, " blocks"]:
    """Scored tokens that the last step of each block wrote; 0 where the steps are not known."""
    blocks = int(block.max()) + 1
    known = batch.written & (batch.step >= 0)
    last = torch.full((blocks,), -1).scatter_reduce(0, block[known], batch.step[known], "amax")
    at_once = known & batch.scored & (batch.step == last[block])
    return torch.zeros(blocks, dtype=torch.long).scatter_add(0, block[at_once], torch.ones_like(block[at_once]))


def raised(look: Look, batch: RolloutBatch, generator: torch.Generator) -> Look:
    """The look with as many masks in every block that has any as the block's last step wrote, drawn among the block's
    scored tokens, and with the weights that belong to so many: those of k masks times k over the new number."""
    block = block_index(batch.document, batch.position, look.block_size)
    least = last_step_counts(batch, block)
    masks = torch.zeros_like(least).scatter_add(0, block[look.read], torch.ones_like(block[look.read]))
    missing = torch.where(masks > 0, (least - masks).clamp_min(0), 0)
    added = _first(batch.scored & ~look.masked, block, missing, generator)
    grown = masks + missing
    ratio = masks.double() / grown.clamp_min(1)
    per_block = torch.zeros(len(masks), dtype=look.weight.dtype)
    per_block = per_block.scatter_reduce(0, block[look.read], look.weight[look.read], "amax")
    read = look.read | added
    changed = read & (missing > 0)[block]
    weight = torch.where(changed, (per_block * ratio)[block], look.weight)
    return replace(look, masked=look.masked | added, read=read, weight=weight)


def _first(
    free: Bool[Tensor, "rows positions"],
    block: Int[Tensor, "rows positions"],
    count: Int[Tensor, " blocks"],
    generator: torch.Generator,
) -> Bool[Tensor, "rows positions"]:
    """`count` of each block's free positions, at random."""
    key = torch.rand(free.shape, generator=generator, dtype=torch.float64)
    chosen = torch.zeros_like(free)
    for number in count.nonzero()[:, 0].tolist():
        where = (free & (block == number)).nonzero()
        order = key[where[:, 0], where[:, 1]].argsort()[: int(count[number])]
        chosen[where[order, 0], where[order, 1]] = True
    return chosen
