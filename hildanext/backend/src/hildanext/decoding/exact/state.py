"""Documents that are written in the parent's own words, all in one forward: drafts are verified and the next ones made.

A row's text ends in a certain token whose keys are not cached yet. A forward feeds it and the drafts behind it as clean
rows, and masks behind the acceptance points (see `kv_cache.draft_attention`). What the parent confirms stays, with its
keys; behind it stands the parent's own token; the group of masks behind that point has made the next drafts.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hildanext.core.errors import LogitsNotFinite
from hildanext.core.runtime import send
from hildanext.decoding.exact.drafting import next_drafts
from hildanext.decoding.exact.expected import Placement
from hildanext.decoding.exact.network import Network, begins_of, network_of
from hildanext.decoding.exact.ngram import look_up
from hildanext.decoding.exact.policy import ExactConfig, Placing
from hildanext.decoding.exact.verify import Verdict, verify_greedy, verify_sampled
from hildanext.decoding.sequence import Step
from hildanext.kv_cache import BlockCache
from hildanext.kv_cache.draft_attention import DraftSegment
from hildanext.models.attention import PREFILL_TOKENS
from hildanext.models.drafter import Drafter
from hildanext.models.sampling import NO_TOKEN, law, sample, uniforms


@dataclass(eq=False)
class ExactRow:
    """One document."""

    index: int
    prompt: int
    """Tokens of the prompt."""
    limit: int
    """The row ends once it has this many tokens."""
    tokens: list[int]
    """Certain ones; the last is not cached yet."""
    cache: BlockCache
    uniform: Float[Tensor, "three capacity"]
    """For each position behind the prompt: which token is drawn there, whether its draft stays, which draft."""
    drafts: list[int] = field(default_factory=list)
    draft_law: Float[Tensor, "drafts vocab"] | None = None
    """What sampled drafts were drawn from."""
    prefill: int = 0
    forwards: int = 0
    rows: int = 0
    """Rows of all its forwards."""
    edits: int = 0
    offered: list[int] = field(default_factory=list)
    """How often a draft stood at each place ..."""
    confirmed: list[int] = field(default_factory=list)
    """... and how often all up to it were right."""
    placement: Placement | None = None
    """What `Placing` has chosen for it."""
    trials: int = 0
    """Forwards that are left of a trial of that."""
    won: float = 0.0
    """Tokens less the price of the forwards that wrote them, in forwards of the parent ..."""
    unpaid: dict[tuple[int, int], int] = field(default_factory=dict)
    """... but for those whose price is not known yet: how many, by their rows and the documents that shared them."""

    @property
    def room(self) -> int:
        """Drafts that may be verified before the parent's own token is the last."""
        return max(self.limit - len(self.tokens) - 1, 0)

    def count(self, given: int, accepted: int) -> None:
        """Note the verdict on `given` drafts."""
        for tally in (self.offered, self.confirmed):
            tally.extend([0] * (given - len(tally)))
        for place in range(given):
            self.offered[place] += 1
            self.confirmed[place] += place < accepted


@dataclass(frozen=True)
class _Plan:
    """What one forward feeds of a row."""

    row: ExactRow
    drafts: list[int]
    given: int
    """Drafts that are some; those behind them are there for the number of rows."""
    placement: Placement

    @property
    def segment(self) -> DraftSegment:
        points = tuple(point for point in self.placement.points if point <= len(self.drafts))
        if not self.drafts and self.placement.points:
            points = (0,)  # whatever the points are: without drafts there is one to stand behind
        return DraftSegment(len(self.row.tokens) - 1, 1 + len(self.drafts), points, self.placement.drafts)


class ExactState:
    """Rows that are written together; `ended(row)` is asked after every forward of a row."""

    def __init__(
        self,
        drafter: Drafter | Network,
        config: ExactConfig,
        placing: Placing,
        ended: Callable[[ExactRow], bool],
        observe: Callable[[Step], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.network, self.config, self.placing = network_of(drafter), config, placing
        self.ended, self.observe, self.clock = ended, observe, clock
        self.rows: list[ExactRow] = []

    def row(self, prompt: Sequence[int], limit: int, seed: int, index: int) -> ExactRow:
        """A document that is to have `limit` tokens; its cache, with room for the scratch of masks, is made here."""
        capacity = self.capacity(limit)
        cache = self.network.new_cache(capacity)
        drawn = uniforms(seed, 3 * capacity).view(3, capacity).to(self.network.device, non_blocking=True)
        return ExactRow(index, len(prompt), limit, list(prompt), cache, drawn)

    def capacity(self, limit: int) -> int:
        """Slots of a document that is to have `limit` tokens: behind them lie the masks of a forward."""
        most = self.placing.most
        return limit + most + (most + 1) * most

    @torch.inference_mode()
    def prefill(self, row: ExactRow) -> None:
        """Feed the prompt but for its last token, and let the row take part."""
        while self.feed(row, PREFILL_TOKENS):
            pass
        self.rows.append(row)

    @torch.inference_mode()
    def feed(self, row: ExactRow, most: int) -> int:
        """Feed a piece of the prompt, of at most so many tokens; how many are left then."""
        piece = min(len(row.tokens) - 1 - row.cache.length, most)
        if piece > 0:
            segment = DraftSegment(row.cache.length, piece, (), 0)
            self.network.forward(row.tokens[segment.start : segment.start + piece], [row.cache], [segment])
            row.cache.commit(segment.start + piece)
            row.prefill += 1
        return len(row.tokens) - 1 - row.cache.length

    @torch.inference_mode()
    def step(self) -> None:
        """One forward of all rows; with fixed rows one of each, since their number is part of what the parent computes.

        The host waits for the device once a forward; twice where somebody looks. Raises `LogitsNotFinite` naming the
        rows whose next token cannot be told; those that it does not name have not moved or have moved whole.
        """
        together = [[row] for row in self.rows] if self.placing.fixed else [self.rows]
        for rows in together:
            self._forward_of(rows)
        self.rows = [row for row in self.rows if not self.ended(row)]

    def _forward_of(self, rows: Sequence[ExactRow]) -> None:
        begin = self.clock()
        plans = [self._plan(row, len(rows)) for row in rows]
        segments = [plan.segment for plan in plans]
        hidden = self._forward(plans, segments)
        clean = sum(segment.clean for segment in segments)
        verdict, sure = self._verdict(plans, segments, self.network.logits(hidden[:clean]))
        drafts, laws = self._next_drafts(segments, hidden[clean:], verdict, plans)
        columns = [verdict.accepted[:, None], verdict.token[:, None], *([] if drafts is None else [drafts])]
        read: list[list[int]] = torch.cat(columns, 1).tolist()
        lost = [plan.row.index for plan, (_, token, *_) in zip(plans, read, strict=True) if token == NO_TOKEN]
        if lost:
            raise LogitsNotFinite("autoregressive parent", lost)
        chances = None if sure is None else sure.tolist()
        for number, (plan, segment, (accepted, token, *following)) in enumerate(
            zip(plans, segments, read, strict=True)
        ):
            keeps = accepted in segment.points
            law_of = None if laws is None or not keeps else laws[number, : segment.places]
            self._write(plan, accepted, token, following[: segment.places] if keeps else [], law_of)
        # The device has been waited for above. What those who look do with it is none of a forward's time.
        fed = [segment.clean + segment.masks for segment in segments]
        self.placing.took(len(rows), sum(fed), self.clock() - begin)
        for plan, own, (accepted, *_) in zip(plans, fed, read, strict=True):
            self.placing.note(plan.row, own, accepted + 1, len(rows))
        if chances is not None:
            for plan, (accepted, token, *_), chance in zip(plans, read, chances, strict=True):
                self._show(plan, accepted, token, chance)

    def _plan(self, row: ExactRow, rows: int) -> _Plan:
        placement = self.placing.choose(row, rows)
        drafts = row.drafts[: min(placement.drafts, row.room)] if self.config.drafter != "none" else []
        if self.config.drafter in ("ngram", "both") and placement.drafts:
            shortest = 1 if self.config.drafter == "ngram" else 2  # one token in common says less than the adapters
            matched = look_up(row.tokens, min(placement.drafts, row.room), shortest)
            if matched:
                drafts, row.draft_law = matched, None
        junk = placement.drafts - len(drafts) if self.placing.fixed else 0
        return _Plan(row, [*drafts, *row.tokens[-1:] * junk], len(drafts), placement)

    def _forward(self, plans: Sequence[_Plan], segments: Sequence[DraftSegment]) -> Float[Tensor, "rows hidden"]:
        """Final states of the clean rows of all documents, then of their masks."""
        tokens = [token for plan in plans for token in (plan.row.tokens[-1], *plan.drafts)]
        for plan, segment in zip(plans, segments, strict=True):
            plan.row.forwards += 1
            plan.row.rows += segment.clean + segment.masks
        return self.network.forward(tokens, [plan.row.cache for plan in plans], segments)

    def _verdict(
        self, plans: Sequence[_Plan], segments: Sequence[DraftSegment], logits: Float[Tensor, "clean vocab"]
    ) -> tuple[Verdict, Float[Tensor, "documents rows"] | None]:
        """What stays of each document; and, where somebody looks, the parent's probability of what it writes."""
        config, device = self.config, logits.device
        widths = [segment.clean for segment in segments]
        most = max(widths)
        begins = begins_of(widths)
        index = send(
            [[begin + min(at, width - 1) for at in range(most)] for begin, width in zip(begins, widths, strict=True)],
            device,
            torch.long,
        )
        drafts = send([plan.drafts + [0] * (most - 1 - len(plan.drafts)) for plan in plans], device, torch.long)
        drafts = drafts.view(len(plans), most - 1)
        given = send([[at < plan.given for at in range(most - 1)] for plan in plans], device, torch.bool)
        given = given.view(len(plans), most - 1)
        if config.temperature <= 0.0:
            verdict = verify_greedy(logits.argmax(-1)[index], drafts, given)
        elif not config.sample_drafts:
            # Drafts without a law of their own: what the parent draws is drawn first, and a draft stays where it is
            # the same. Each is so with the chance that the rule min(1, p / q) gives it, and a seed's text is the
            # parent's own whatever was drafted.
            draw = self._uniform(plans, most, 0)
            picks = sample(logits[index.flatten()], draw.flatten(), config.temperature, config.top_p, config.top_k)
            verdict = verify_greedy(picks.view(index.shape), drafts, given)
        else:
            laws = law(logits, config.temperature, config.top_p, config.top_k)[index]
            draw, accept = self._uniform(plans, most, 0), self._uniform(plans, most, 1)[:, :-1]
            verdict = verify_sampled(laws, drafts, given, self._draft_laws(plans, most - 1, laws), accept, draw)
        finite = logits.amax(-1).isfinite()[index].gather(1, verdict.accepted[:, None])[:, 0]
        verdict = verdict._replace(token=torch.where(finite, verdict.token, NO_TOKEN))
        if self.observe is None:
            return verdict, None
        written = torch.cat([drafts, verdict.token[:, None]], 1).scatter(
            1, verdict.accepted[:, None], verdict.token[:, None]
        )
        chance = logits.log_softmax(-1)[index].gather(2, written[..., None].clamp_min(0))[..., 0].exp()
        return verdict, chance

    def _uniform(self, plans: Sequence[_Plan], count: int, kind: int) -> Float[Tensor, "documents count"]:
        """Of the positions behind each row's certain token."""
        begins = [len(plan.row.tokens) - plan.row.prompt for plan in plans]
        return torch.stack([plan.row.uniform[kind, at : at + count] for at, plan in zip(begins, plans, strict=True)])

    def _draft_laws(
        self, plans: Sequence[_Plan], count: int, like: Tensor
    ) -> Float[Tensor, "documents drafts vocab"] | None:
        """What drafts were drawn from; a choice counts as a law of one token. None where all are choices."""
        if all(plan.row.draft_law is None for plan in plans):
            return None
        laws = like.new_zeros(len(plans), count, like.shape[-1])
        for number, plan in enumerate(plans):
            here = plan.given
            if plan.row.draft_law is not None:
                laws[number, :here] = plan.row.draft_law[:here]
            elif here:
                laws[number, range(here), plan.drafts[:here]] = 1.0
        return laws

    def _next_drafts(
        self,
        segments: Sequence[DraftSegment],
        hidden: Float[Tensor, "masks hidden"],
        verdict: Verdict,
        plans: Sequence[_Plan],
    ) -> tuple[Int[Tensor, "documents places"] | None, Tensor | None]:
        """What the group behind each document's accepted drafts says, and the laws of drafts that are drawn.

        Documents without such a group get what is not read.
        """
        if not len(hidden):
            return None, None
        device, begins = hidden.device, begins_of([segment.masks for segment in segments])
        most, widest = max(segment.places for segment in segments), max(segment.clean for segment in segments)
        first = []
        for begin, segment in zip(begins, segments, strict=True):
            at = {point: begin + number * segment.places for number, point in enumerate(segment.points)}
            first.append([at.get(point, 0) for point in range(widest)])
        group = send(first, device, torch.long).gather(1, verdict.accepted[:, None])
        rows = (group + torch.arange(most, device=device)).clamp_max(len(hidden) - 1)
        draw = None
        if self.config.temperature > 0.0 and self.config.sample_drafts:
            draw = partial(self._drawn, self._draft_uniform(plans, verdict, most))
        return next_drafts(self.network, hidden[rows], verdict.token.clamp_min(0), draw)

    def _draft_uniform(self, plans: Sequence[_Plan], verdict: Verdict, most: int) -> Float[Tensor, "documents places"]:
        """Draft i of a row stands i + 1 positions behind the token that this forward has made certain."""
        device = verdict.accepted.device
        starts = send([len(plan.row.tokens) + 1 - plan.row.prompt for plan in plans], device, torch.long)
        places = (starts + verdict.accepted)[:, None] + torch.arange(most, device=device)
        drawn = [plan.row.uniform[2] for plan in plans]
        return torch.stack([row[at.clamp_max(len(row) - 1)] for row, at in zip(drawn, places, strict=True)])

    def _drawn(
        self,
        chances: Float[Tensor, "documents places"],
        scores: Float[Tensor, "documents count"],
        place: int,
    ) -> tuple[Int[Tensor, "documents one"], Float[Tensor, "documents count"]]:
        """A sampled draft by logits, as a place in them, and the law that it was drawn from."""
        config = self.config
        laws = law(scores, config.temperature, config.top_p, config.top_k)
        cumulative = laws.cumsum(-1)
        height = chances[:, place, None].to(cumulative) * cumulative[..., -1:]
        chosen = torch.searchsorted(cumulative, height, right=True)
        return chosen.clamp_max(laws.shape[-1] - 1), laws

    def _write(self, plan: _Plan, accepted: int, token: int, drafts: list[int], draft_law: Tensor | None) -> None:
        row = plan.row
        row.count(plan.given, accepted)
        self.placing.verdict(plan.given, accepted)
        row.edits += accepted < plan.given
        row.tokens += [*plan.drafts[:accepted], token]
        row.cache.commit(len(row.tokens) - 1)
        row.drafts, row.draft_law = drafts, draft_law

    def _show(self, plan: _Plan, accepted: int, token: int, chances: Sequence[float]) -> None:
        row = plan.row
        begin = len(row.tokens) - accepted - 1
        kept = [(begin + at, draft, chances[at]) for at, draft in enumerate(plan.drafts[:accepted])]
        written: dict[str, Any] = {"drafts": kept}
        if accepted < plan.given:
            written["edits"] = [(begin + accepted, plan.drafts[accepted], token, chances[accepted])]
        else:
            written["drafts"] = [*kept, (begin + accepted, token, chances[accepted])]
        assert self.observe is not None
        self.observe(Step(row.index, row.forwards, begin, "exact", [], **written, final=True))
