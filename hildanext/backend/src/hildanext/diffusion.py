"""The forward process: noise levels, corruption, weights, and what can be predicted.

Masked block diffusion with the linear schedule: a token of a block at noise level t is masked with
probability t and its loss weighs 1/t (BD3-LM, arXiv:2503.09573; LLaDA2.0, arXiv:2512.15745). Observed
tokens may be replaced by random ones, to be edited back (LLaDA2.1, arXiv:2602.08676, which publishes no
rates: ours are choices). Shapes are [batch seq] throughout.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Shift = Literal["none", "left"]

SMALLEST_TIME = 1e-3
"""Of a noise level where none is asked for: the interval that BD3-LM evaluates on. At t -> 0 the weight 1/t has no
finite variance."""


@dataclass(frozen=True)
class CausalPairs:
    """Which token was computed from which: `effect` and `cause` are token indices inside batch row `row`."""

    row: Int[Tensor, " pairs"]
    effect: Int[Tensor, " pairs"]
    cause: Int[Tensor, " pairs"]
    weight: Float[Tensor, " pairs"]

    @classmethod
    def collate(cls, rows: Iterable[Iterable[tuple[int, int, float]]]) -> "CausalPairs | None":
        """The pairs (effect, cause, weight) of each batch row in turn; None where no row has any."""
        flat = [(number, *pair) for number, pairs in enumerate(rows) for pair in pairs]
        if not flat:
            return None
        row, effect, cause, weight = zip(*flat, strict=True)
        return cls(torch.tensor(row), torch.tensor(effect), torch.tensor(cause), torch.tensor(weight).float())

    def to(self, device: torch.device | str) -> "CausalPairs":
        parts = (self.row, self.effect, self.cause, self.weight)
        return CausalPairs(*(part.to(device, non_blocking=True) for part in parts))


@dataclass(frozen=True)
class NoisedBatch:
    """One noised look at a batch. Blocks are `position // block_size` inside each document."""

    clean: Int[Tensor, "batch seq"]
    noisy: Int[Tensor, "batch seq"]
    document: Int[Tensor, "batch seq"]
    position: Int[Tensor, "batch seq"]
    maskable: Bool[Tensor, "batch seq"]
    masked: Bool[Tensor, "batch seq"]
    """Holds the mask token (the M2T set)."""
    replaced: Bool[Tensor, "batch seq"]
    """Holds a wrong token (the T2T set), disjoint from `masked`."""
    time: Float[Tensor, "batch seq"]
    """Noise level of the token's block, in (0, 1]."""
    block_size: int
    pairs: CausalPairs | None = None
    """Causes and effects among the tokens, where the data has causal graphs."""
    chance: Float[Tensor, "batch seq"] | None = None
    """A uniform number in [0, 1) for each token, independent of what the view shows: for losses that take a share."""

    def to(self, device: torch.device | str) -> "NoisedBatch":
        """The view on a device; the host does not wait for it."""
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        there: dict[str, Any] = {
            name: part.to(device, non_blocking=True) for name, part in parts.items() if isinstance(part, Tensor)
        }
        return replace(self, **there, pairs=None if self.pairs is None else self.pairs.to(device))

    @property
    def kept(self) -> Bool[Tensor, "batch seq"]:
        """Maskable, visible and right: what editing must leave alone."""
        return self.maskable & ~self.masked & ~self.replaced


View = NoisedBatch
"""The name under which the specification promises it."""


def block_index(
    document: Int[Tensor, "batch seq"], position: Int[Tensor, "batch seq"], block_size: int
) -> Int[Tensor, "batch seq"]:
    """Number of each token's block among all blocks of the batch, counted row by row from 0."""
    starts = position % block_size == 0
    starts[:, 1:] |= document[:, 1:] != document[:, :-1]
    starts[:, 0] = True
    return starts.flatten().cumsum(0).view_as(starts) - 1


def block_times(
    blocks: Int[Tensor, "batch seq"],
    t_range: tuple[float, float],
    generator: torch.Generator,
    stratified: bool = True,
) -> Float[Tensor, "batch seq"]:
    """One noise level per block, uniform in `t_range`; stratified over the batch (one draw per stratum, shuffled)."""
    low, high = t_range
    count = int(blocks.max()) + 1
    u = torch.rand(count, generator=generator)
    if stratified:
        u = (torch.randperm(count, generator=generator) + u) / count
    return (low + (high - low) * u)[blocks.cpu()].to(blocks.device)


def mask_tokens(
    clean: Int[Tensor, "batch seq"],
    document: Int[Tensor, "batch seq"],
    position: Int[Tensor, "batch seq"],
    maskable: Bool[Tensor, "batch seq"],
    time: Float[Tensor, "batch seq"],
    block_size: int,
    mask_id: int,
    generator: torch.Generator,
) -> NoisedBatch:
    """Mask each maskable token with the probability `time` of its block."""
    draw = torch.rand(clean.shape, generator=generator).to(clean.device)
    hidden = draw < time
    masked = maskable & hidden
    # Inside either outcome what is left of the draw is uniform again, so that no further one is needed.
    chance = torch.where(hidden, draw / time, (draw - time) / (1.0 - time)).float().clamp_max(1.0 - 2.0**-24)
    return NoisedBatch(
        clean=clean,
        noisy=clean.masked_fill(masked, mask_id),
        document=document,
        position=position,
        maskable=maskable,
        masked=masked,
        replaced=torch.zeros_like(masked),
        time=time,
        block_size=block_size,
        chance=chance,
    )


def complement(view: NoisedBatch, mask_id: int) -> NoisedBatch:
    """The other half of a complementary pair: exactly the maskable tokens that `view` shows are masked.

    Its noise level is 1 - t (LLaDA2.0, arXiv:2512.15745, sec. 5.1; also Fast-dLLM v2, arXiv:2509.26328).
    """
    masked = view.maskable & ~view.masked
    return replace(
        view,
        noisy=view.clean.masked_fill(masked, mask_id),
        masked=masked,
        replaced=torch.zeros_like(masked),
        time=(1.0 - view.time).clamp_min(SMALLEST_TIME),
    )


def effect_rates(view: NoisedBatch, rate: float, boost: float) -> Float[Tensor, "batch seq"]:
    """Replacement rates that are `boost` times `rate` (at most 1) at the effects of causal pairs, `rate` elsewhere.

    A wrong result among right operands is what a correction pass should learn to see (ours; no paper has it).
    """
    rates = torch.full(view.clean.shape, rate, device=view.clean.device)
    if view.pairs is not None:
        rates[view.pairs.row, view.pairs.effect] = min(1.0, boost * rate)
    return rates


def replace_tokens(
    view: NoisedBatch,
    rate: float | Float[Tensor, "batch seq"],
    real_ids: Int[Tensor, " real"],
    generator: torch.Generator,
) -> NoisedBatch:
    """Replace each visible maskable token with probability `rate` (of all, or of each) by a different real token.

    `real_ids` lists the ids that may be drawn: no specials, no unused rows, no mask.
    """
    draw = torch.rand(view.clean.shape, generator=generator).to(view.clean.device)
    chosen = view.kept & (draw < rate)
    picks = torch.randint(len(real_ids), view.clean.shape, generator=generator)
    noise = real_ids.cpu()[picks]
    # A draw that hit the truth moves on to the next real id, so that a replaced token is always wrong.
    following = real_ids.cpu()[(picks + 1) % len(real_ids)]
    noise = torch.where(noise == view.clean.cpu(), following, noise).to(view.clean.device)
    return replace(view, noisy=torch.where(chosen, noise, view.noisy), replaced=view.replaced | chosen)


def mask_always(view: NoisedBatch, always_masked: Bool[Tensor, "batch seq"], mask_id: int) -> NoisedBatch:
    """Show `always_masked` tokens, none of them maskable, as masks that nobody has to fill."""
    return replace(view, noisy=view.noisy.masked_fill(always_masked, mask_id))


def next_turn(view: NoisedBatch, draft: Int[Tensor, "batch seq"], mask_id: int) -> NoisedBatch:
    """The view of a multi-turn forward's next turn: `draft` replaces the noisy tokens, the labels stay the truth."""
    draft = torch.where(view.maskable, draft, view.noisy)
    masked = view.maskable & (draft == mask_id)
    return replace(view, noisy=draft, masked=masked, replaced=view.maskable & ~masked & (draft != view.clean))


def elbo_weight(view: NoisedBatch) -> Float[Tensor, "batch seq"]:
    """1/t at masked tokens, 0 elsewhere: summed cross-entropies times this are a bound on -log p."""
    return torch.where(view.masked, 1.0 / view.time, torch.zeros_like(view.time))


def targets(
    maskable: Bool[Tensor, "batch seq"], position: Int[Tensor, "batch seq"], shift: Shift
) -> Bool[Tensor, "batch seq"]:
    """Tokens that can be noised and predicted at all: under the left shift not the first of a document."""
    return maskable & (position > 0) if shift == "left" else maskable
