"""Order-Token Search: several texts of a prompt at once, which branch and are chosen among at the ends of blocks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.core.errors import ConfigError
from hildanext.decoding.base import Canvas, Sampling, most_confident
from hildanext.decoding.beams import (
    Beam,
    RankedCanvas,
    best,
    child_seed,
    merged,
    ranking_noise,
    shares,
    written_logp,
)
from hildanext.decoding.reveal import Facts
from hildanext.decoding.sequence import SequenceState, Step
from hildanext.decoding.state import DecodeState
from hildanext.decoding.threshold_edit import ThresholdEdit


@config
class OrderTokenSearch(ThresholdEdit):
    """Write several texts side by side and keep those that the model finds likeliest, block by block.

    A beam writes its block as `threshold_edit` with the same knobs; beams differ by what they draw and by the order in
    which masks are filled where none passes the threshold, and thresholds read the model's own probabilities. At the
    end of a block equal texts become one, the best ones go on, and branch behind the next block's first forward, which
    all children of a beam share. The first beam draws as plain decoding does: alone it is `threshold_edit`.

    Paper: Order-Token Search, arXiv:2601.20339.
    Differs: a reconstruction from its abstract and from what others tell of its algorithm 1. Behind a block nothing is
    there yet that could be seen, so that its score (Eq. 2) is by the prefix alone, of the block fully masked: the
    block's first forward has it. `path_ll`, `length`, `keep` and `search_below` (from SOAR) are not in it; a beam's
    noise lasts for its block.
    """

    research: ClassVar[bool] = True
    searches: ClassVar[bool] = True

    temperature: float = Field(default=0.5, ge=0, allow_inf_nan=False, json_schema_extra={"request_maximum": 100})
    """0 is greedy: beams then differ by their order alone."""
    beams: int = Field(default=4, ge=1, le=64)
    """Texts that are written side by side, K; 1 is plain decoding."""
    children: Literal["all", "each"] = "all"
    """K children of all kept beams together in each block, or K of each of them."""
    keep: int | None = Field(default=None, ge=1, le=64)
    """Beams that go on behind a block, at most K; None: K with children each, half of K with children in all. K with
    children in all is best-of-K: K texts, chosen among in the end."""
    score: Literal["eq2", "path_ll"] = "eq2"
    """eq2: log p of the block's tokens when all of it was masked. path_ll: of each token when it was written."""
    accumulate: bool = True
    """Compare texts by all their blocks; false: by the newest alone."""
    length: Literal["mean", "sum"] = "mean"
    """Compare texts of unequal lengths by their log p per token, or by its sum, which favours those that end early."""
    order_noise: float | None = Field(default=None, ge=0, le=10, allow_inf_nan=False)
    """Scale of the Gumbel noise on log confidence in the ranking of masks where none passes; off (None) is the
    temperature's, 0 none."""
    search_below: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    """Branch only in blocks whose masks' mean confidence in the first forward is below; off (None) is in every one."""

    def __post_init__(self) -> None:
        ThresholdEdit.__post_init__(self)
        if self.window > 0:
            raise ConfigError(
                f"window {self.window} edits finished blocks, whose scores a search has booked", "leave window out"
            )
        if self.keep is not None and self.keep > self.beams:
            raise ConfigError(f"keep {self.keep} is above beams {self.beams}", f"give 1 to {self.beams}")
        if self.order_noise and self.fallback == "left":
            raise ConfigError(
                f"order_noise {self.order_noise} with fallback 'left', which ranks nothing", "leave one of them out"
            )

    def __hash__(self) -> int:
        return ThresholdEdit.__hash__(self)

    @property
    def sampling(self) -> Sampling | None:
        return None  # what is kept was chosen among several draws

    @property
    def kept(self) -> int:
        """Beams that go on behind a block."""
        if self.keep is not None:
            return self.keep
        return self.beams if self.children == "each" else max(self.beams // 2, 1)

    @property
    def rows(self) -> int:
        """Rows that a prompt has at a time, at most, each with a cache of its own."""
        return self.beams * self.kept if self.children == "each" else self.beams

    @property
    def ranking_scale(self) -> float:
        return self.temperature if self.order_noise is None else self.order_noise

    def _one(self, facts: Facts, canvas: Canvas) -> Bool[Tensor, "batch block"]:
        if not isinstance(canvas, RankedCanvas) or canvas.noise is None or self.fallback == "left":
            return super()._one(facts, canvas)
        entropy = facts.entropy if self.fallback == "entropy" else None
        sure = facts.confidence if entropy is None else (-entropy).exp()
        return most_confident(sure * canvas.noise.to(sure.device), canvas.masked)

    def search(self, state: DecodeState, tell: Callable[[SequenceState, list[Beam]], None]) -> None:
        """Write the texts of every row of `state`, whose prompts are fed and whose `ended` may be asked of any beam.

        `tell` gets the best text's row as soon as a search has ended, with all counts of the search, and the beams that
        were left, best first. Raises `LogitsNotFinite`.
        """
        Search(self, state, tell).run()


@dataclass(eq=False)
class _Request:
    """The search of one prompt."""

    beams: list[Beam]
    """Those that write; before the first forward of a block the kept ones, best first."""
    done: list[Beam] = field(default_factory=list)
    """Kept ones that have ended."""
    resting: list[Beam] = field(default_factory=list)
    """Those that have finished the block before others."""
    denoise: int = 0
    commit: int = 0
    rows: int = 0
    """Forwards that any of its beams took part in, and the rows of all of them."""


class Search:
    """Beams of several prompts, all in one forward: the rows of one `DecodeState`."""

    def __init__(
        self, knobs: OrderTokenSearch, state: DecodeState, tell: Callable[[SequenceState, list[Beam]], None]
    ) -> None:
        self.knobs, self.state, self.tell = knobs, state, tell
        self.watch, self._taken = state.observe, list[Step]()
        state.observe = None if self.watch is None else self._taken.append
        self.requests = [_Request([Beam(row, plain=True)]) for row in state.rows]
        self._beams = {request.beams[0].row: request.beams[0] for request in self.requests}

    def run(self) -> None:
        while (canvas := self.state.canvas()) is not None:
            self._step(canvas)

    def _step(self, canvas: Canvas) -> None:
        state, knobs = self.state, self.knobs
        where = canvas.read(knobs.needs(canvas))
        before = {row: (row.denoise, row.commit, row.rows) for row in state.rows}
        logits = state.logits(where)
        self._count(before)
        owners = self._branch(canvas, where, logits)
        if owners is not None:
            logits = _repeated(logits, where, owners)
            copied = state.canvas()
            assert copied is not None, "rows were copied, so there are some"
            canvas, where = copied, copied.read(knobs.needs(copied))
        beams = [self._beams[row] for row in state.rows]
        edit = knobs.edit(logits, where, self._ranked(canvas, beams))
        if knobs.score == "path_ll":
            for beam, wrote, told in zip(beams, edit.write, written_logp(logits, where, edit), strict=True):
                assert beam.path is not None
                beam.path = torch.where(wrote, told, beam.path)
        finished = state.write(edit)
        for beam, step in zip(beams, self._taken, strict=False):
            beam.steps.append(step)
        self._taken.clear()
        if finished:
            self._finished([beams[number] for number in finished])

    def _count(self, before: dict[SequenceState, tuple[int, int, int]]) -> None:
        for request in self.requests:
            told = [(beam.row, before[beam.row]) for beam in request.beams if beam.row in before]
            request.denoise += max((row.denoise - denoise for row, (denoise, _, _) in told), default=0)
            request.commit += max((row.commit - commit for row, (_, commit, _) in told), default=0)
            request.rows += sum(row.rows - rows for row, (_, _, rows) in told)

    def _branch(self, canvas: Canvas, where: Bool[Tensor, "batch block"], logits: Tensor) -> list[int] | None:
        """Beams that have had the first forward of a block keep what it says of it and get their children: of which row
        of the forward each row of the state is now a copy. None: nobody branched."""
        state, fresh = self.state, [row for row in self.state.rows if self._beams[row].first is None]
        if not fresh:
            return None
        counts = where.sum(-1).tolist()
        parts = dict(zip(state.rows, logits.split(counts), strict=True))
        read = dict(zip(state.rows, where & canvas.masked, strict=True))
        places = dict(zip(state.rows, where, strict=True))
        sure: dict[SequenceState, bool] = {}
        for row in fresh:
            beam = self._beams[row]
            beam.first = parts[row][read[row][places[row]]].log_softmax(-1)
            beam.read, beam.path = read[row], torch.zeros(state.block, dtype=torch.float64, device=where.device)
            level = self.knobs.search_below
            sure[row] = level is not None and bool(beam.first.amax(-1).exp().mean() >= level)
        numbers = {row: number for number, row in enumerate(state.rows)}
        rows, owners, branched = list[SequenceState](), list[int](), False
        for request in self.requests:
            if request.beams and request.beams[0].row in sure:
                wants = [not sure[beam.row] for beam in request.beams]
                spare = self.knobs.beams - (0 if self.knobs.children == "each" else len(request.done))
                given = shares(request.beams, wants, spare, self.knobs.children == "each")
                parents = [(beam, count) for beam, count in zip(request.beams, given, strict=True)]
                request.beams = [child for beam, count in parents for child in self._children(beam, count)]
                owners += [numbers[beam.row] for beam, count in parents for _ in range(count)]
                branched = branched or any(count > 1 for _, count in parents)
            else:
                owners += [numbers[beam.row] for beam in request.beams if beam.row in numbers]
            rows += [beam.row for beam in request.beams if beam not in request.resting]
        if not branched:
            return None
        state.rows = rows
        return owners

    def _children(self, beam: Beam, count: int) -> list[Beam]:
        children = [beam]
        for child in range(1, count):
            row = self.state.fork(beam.row, child_seed(beam.row.seed, beam.row.start, child))
            assert beam.path is not None
            other = Beam(row, False, beam.whole, beam.last, False, beam.first, beam.read, beam.path, list(beam.steps))
            self._beams[row] = other
            children.append(other)
        return children

    def _ranked(self, canvas: Canvas, beams: Sequence[Beam]) -> Canvas:
        scale = self.knobs.ranking_scale
        if scale == 0 or all(beam.plain for beam in beams):
            return canvas
        noise = torch.stack([ranking_noise(beam, self.state.block, scale) for beam in beams])
        parts = {part.name: getattr(canvas, part.name) for part in fields(canvas)}
        return RankedCanvas(**parts, noise=noise.to(canvas.tokens.device))

    def _finished(self, beams: Sequence[Beam]) -> None:
        """Beams have finished a block: they wait for the others of their request, which then are chosen among."""
        state, block = self.state, self.state.block
        for row in state.retire_finished():
            self._beams[row].ended = True
        for beam in beams:
            beam.finish_block(block, state.card.mask_id, self.knobs.score)
            state.remove(beam.row)
        waiting, added = set(beams), False
        for request in list(self.requests):
            request.resting += [beam for beam in request.beams if beam in waiting]
            if len(request.resting) == len(request.beams) and request.resting:
                self._choose(request)
                added = added or bool(request.beams)
        if added:  # in the order of the prompts, so that a single beam's forwards are those of plain decoding
            place = {beam.row: number for number, beam in enumerate(self._in_order())}
            state.rows.sort(key=lambda row: place[row])

    def _in_order(self) -> list[Beam]:
        return [beam for request in self.requests for beam in request.beams]

    def _choose(self, request: _Request) -> None:
        knobs = self.knobs
        rule = (knobs.accumulate, knobs.length)
        left = best(merged([*request.done, *request.resting], *rule), knobs.kept, *rule)
        for beam in request.resting:
            if beam not in left:
                del self._beams[beam.row]
        request.done = [beam for beam in left if beam.ended]
        request.beams, request.resting = [beam for beam in left if not beam.ended], []
        for beam in request.beams:
            self.state.add(beam.row)
        if not request.beams:
            self.requests.remove(request)
            self._end(request, left)

    def _end(self, request: _Request, left: list[Beam]) -> None:
        row = left[0].row
        row.denoise, row.commit, row.rows = request.denoise, request.commit, request.rows
        if self.watch is not None:
            for step in left[0].steps:
                self.watch(step)
        self.tell(row, left)


def _repeated(logits: Float[Tensor, "rows vocab"], where: Bool[Tensor, "batch block"], owners: Sequence[int]) -> Tensor:
    """The logits at `where` of the rows `owners`, one behind another."""
    parts = logits.split(where.sum(-1).tolist())
    return torch.cat([parts[owner] for owner in owners])


__all__ = ["OrderTokenSearch", "Search"]
