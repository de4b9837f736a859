"""Ratios of the policy that learns to the one that wrote the answers, and what clipping leaves of them."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hildanext.rl.divergence import divergence
from hildanext.rl.looks import Scores
from hildanext.rl.objectives.base import PolicyInputs

Level = Literal["sequence", "token"]
"""What a ratio is of: `sequence` gives [rows], `token` [looks rows positions]."""


def differences(now: Scores, other: Scores, valid: Bool[Tensor, " rows"], level: Level) -> Float[Tensor, "*counted"]:
    """log p of `now` less that of `other` under the same looks, in nats; exactly 0 where nothing is read and in rows
    that are not valid, whatever stands there."""
    if level == "sequence":
        return torch.where(valid.to(now.raw.device), now.sequence - other.sequence, 0.0)
    counts = now.read & valid.to(now.raw.device)[:, None]
    return torch.where(counts, now.raw - other.raw, 0.0)


def ratios(now: Scores, old: Scores, valid: Bool[Tensor, " rows"], level: Level) -> Float[Tensor, "*counted"]:
    """How much likelier `now` finds what was written than `old` did; exactly 1 where nothing counts, as above.

    A ratio of whole answers is the geometric mean of its tokens': exp(difference / length).
    """
    apart = differences(now, old, valid, level)
    return (apart / now.length.clamp_min(1) if level == "sequence" else apart).exp()


def counted(inputs: PolicyInputs) -> tuple[Float[Tensor, " rows"], Bool[Tensor, " rows"]]:
    """Advantage and validity beside the scores, in their dtype; the advantage 0 where a row is not valid."""
    valid = inputs.valid.to(inputs.now.raw.device)
    return torch.where(valid, inputs.advantage.to(inputs.now.raw), 0.0), valid


def surrogate(
    ratio: Float[Tensor, "*counted"],
    advantage: Float[Tensor, "*broadcast"],
    epsilon: float,
    clip: Literal["ppo", "both_sides"] = "ppo",
) -> tuple[Float[Tensor, "*counted"], Bool[Tensor, "*counted"]]:
    """What is to be made large, and where clipping has taken its gradient.

    `ppo`: the smaller of ratio times advantage and the same with the ratio held in 1 - epsilon to 1 + epsilon, which
    cuts only what has gone far enough in the advantage's direction. `both_sides`: the held ratio times the advantage.

    Source: PPO, arXiv:1707.06347; both sides: StableDRL, arXiv:2603.06743.
    """
    held = ratio.clamp(1 - epsilon, 1 + epsilon)
    above, below = ratio > 1 + epsilon, ratio < 1 - epsilon
    if clip == "both_sides":
        return held * advantage, above | below
    return torch.minimum(ratio * advantage, held * advantage), above & (advantage > 0) | below & (advantage < 0)


def over_tokens(
    inputs: PolicyInputs, epsilon: float, beta: float = 0.0, corrected: bool = False
) -> dict[str, Float[Tensor, " rows"]]:
    """PPO on tokens: `loss`, and detached `ratio` and `clipped`, each summed over an answer's tokens by their weight in
    the estimate; 0 in rows that are not valid.

    `beta` adds k3 to the reference, per token, and `kl` to what is returned; `corrected` multiplies it by the ratio,
    which makes it an estimate for samples of the old policy (arXiv:2512.02556).
    """
    advantage, valid = counted(inputs)
    ratio = ratios(inputs.now, inputs.old, valid, "token")
    gain, clipped = surrogate(ratio, advantage[:, None], epsilon)
    terms = {"loss": -gain, "ratio": ratio.detach(), "clipped": clipped.to(ratio)}
    if beta > 0:
        assert inputs.reference is not None, "a KL is to a reference"
        kl = divergence("k3", differences(inputs.now, inputs.reference, valid, "token"))
        kl = kl * ratio if corrected else kl
        terms |= {"loss": beta * kl - gain, "kl": kl.detach()}
    weight = torch.where(valid[:, None], inputs.now.weight, 0.0)
    return {name: (term * weight).sum((0, 2)) for name, term in terms.items()}
