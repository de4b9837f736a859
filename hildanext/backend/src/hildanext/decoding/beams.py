"""Beams of a search: several texts of one prompt, what each is worth, and which of them go on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hildanext.decoding.base import Canvas, Edit
from hildanext.decoding.sequence import SequenceState, Step
from hildanext.models.sampling import uniforms

Score = Literal["eq2", "path_ll"]
LengthRule = Literal["mean", "sum"]


class LogP(NamedTuple):
    """Log-probability of some tokens, in nats."""

    total: float = 0.0
    tokens: int = 0

    def plus(self, other: "LogP") -> "LogP":
        return LogP(self.total + other.total, self.tokens + other.tokens)

    def value(self, length: LengthRule) -> float:
        """What texts are compared by: per token, or as it is."""
        return self.total / max(self.tokens, 1) if length == "mean" else self.total


@dataclass(eq=False)
class Beam:
    """A text that is being written. The first one of a request draws as plain decoding does, and stays `plain`."""

    row: SequenceState
    plain: bool
    whole: LogP = LogP()
    """Of its finished blocks."""
    last: LogP = LogP()
    """Of the newest one."""
    ended: bool = False
    first: Float[Tensor, "read vocab"] | None = None
    """Log-probabilities of its active block's first forward; None: it has had none."""
    read: Bool[Tensor, " block"] | None = None
    """Where they are."""
    path: Float[Tensor, " block"] | None = None
    """Log-probability of each token of the active block in the forward that wrote it last."""
    steps: list[Step] = field(default_factory=list)
    """What its forwards did, where somebody watches."""

    def text(self) -> tuple[int, ...]:
        """Its final tokens behind the prompt."""
        return tuple(self.row.tokens[self.row.prompt : self.row.start].tolist())

    def finish_block(self, block: int, mask_id: int, score: Score) -> None:
        """Book the block that has just become final; its scores are dropped. Masks behind the text's end and what
        stands behind a written end do not count."""
        row, first, read, path = self.row, self.first, self.read, self.path
        assert first is not None and read is not None and path is not None, "a block without a forward"
        begin = row.start - block
        tokens = row.tokens[begin : row.start]
        counts = (tokens != mask_id) & read
        ids = tokens.tolist()
        ends = [place for place in range(block) if ids[place] in row.eos and begin + place >= row.prompt]
        if ends:
            counts[ends[0] + 1 :] = False
        of_tokens = eq2(first, read, tokens) if score == "eq2" else path
        self.last = LogP(float(of_tokens[counts].sum()), int(counts.sum()))
        self.whole = self.whole.plus(self.last)
        self.first = self.read = self.path = None


def eq2(
    first: Float[Tensor, "read vocab"], read: Bool[Tensor, " block"], tokens: Int[Tensor, " block"]
) -> Float[Tensor, " block"]:
    """Log-probability of each token where `read`, by `first`, in fp64; 0 elsewhere."""
    of_read = first.gather(-1, tokens[read][:, None])[:, 0].double()
    return torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device).masked_scatter(read, of_read)


def written_logp(
    logits: Float[Tensor, "rows vocab"], where: Bool[Tensor, "batch block"], edit: Edit
) -> Float[Tensor, "batch block"]:
    """Log-probability of what an edit writes by the logits at `where`, in fp64; 0 elsewhere."""
    logp = logits.gather(-1, edit.tokens[where][:, None])[:, 0] - logits.logsumexp(-1)
    nothing = torch.zeros(where.shape, dtype=torch.float64, device=where.device)
    return nothing.masked_scatter(where, logp.double()).masked_fill(~edit.write, 0.0)


def merged(beams: Sequence[Beam], accumulate: bool, length: LengthRule) -> list[Beam]:
    """Of beams with the same text one: the plain one where it is among them, with the best score of them."""
    kept: dict[tuple[int, ...], Beam] = {}
    for beam in beams:
        other = kept.setdefault(beam.text(), beam)
        if other is beam:
            continue
        stays = beam if beam.plain else other
        best = max((other, beam), key=lambda one: value(one, accumulate, length))
        stays.whole, stays.last = best.whole, best.last
        kept[beam.text()] = stays
    return list(kept.values())


def best(beams: Sequence[Beam], keep: int, accumulate: bool, length: LengthRule) -> list[Beam]:
    """The `keep` best, best first; ties to the text of the lower ids, so that the order of `beams` decides nothing."""
    return sorted(beams, key=lambda beam: (-value(beam, accumulate, length), beam.text()))[:keep]


def value(beam: Beam, accumulate: bool, length: LengthRule) -> float:
    return (beam.whole if accumulate else beam.last).value(length)


def shares(beams: Sequence[Beam], wants: Sequence[bool], children: int, each: bool) -> list[int]:
    """How many children each of the living `beams` has, best first: `children` per beam or in all; one where it does
    not want more."""
    if each:
        return [children if want else 1 for want in wants]
    counts, spare = [1] * len(beams), children - len(beams)
    wanting = [number for number, want in enumerate(wants) if want]
    for turn in range(max(spare, 0) if wanting else 0):
        counts[wanting[turn % len(wanting)]] += 1
    return counts


@lru_cache(maxsize=4096)
def child_seed(seed: int, start: int, child: int) -> int:
    """Of the draws of a beam's further child in the block at `start`; it depends on no other beam."""
    return _hashed(f"child {child} of the block at {start}, seed {seed}")


def ranking_noise(beam: Beam, size: int, scale: float) -> Float[Tensor, " block"]:
    """What a beam's confidences are multiplied by before they are ranked: e to the power of `scale` times Gumbel
    noise, the same in every step of its block; 1 of the plain beam."""
    if beam.plain or scale == 0:
        return torch.ones(size, dtype=torch.float64)
    draws = uniforms(_hashed(f"ranks of the block at {beam.row.start}, seed {beam.row.seed}"), size)
    return (scale * -(-draws.log()).log()).exp()


def _hashed(text: str) -> int:
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class RankedCanvas(Canvas):
    """A canvas whose fallback ranks masks by noisy confidences."""

    noise: Float[Tensor, "batch block"] | None = None
    """What they are multiplied by."""


__all__ = [
    "Beam",
    "LengthRule",
    "LogP",
    "RankedCanvas",
    "Score",
    "best",
    "child_seed",
    "eq2",
    "merged",
    "ranking_noise",
    "shares",
    "value",
    "written_logp",
]
