"""The model's side of decoding: documents that each denoise their own active block, all in one forward.

Rows advance independently, join (`join`) and leave whenever they like; a forward feeds the tokens of all of them one
behind another, unpadded. A finished block enters its row's cache as clean rows of
the next forward ("fused"), of a forward of its own ("separate"), or with no work at all where the block-causal
rule makes its last, unchanged forward the same thing ("auto", fused otherwise). `parent` alignment reads the first
token of a block from the clean hidden state before it, kept in `boundary`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hildanext import masks
from hildanext.decode.base import Canvas, Edit, EditRule
from hildanext.decode.sampling import uniforms
from hildanext.kv import BlockCache, CachedAttention, Run, positions_of, rows_of
from hildanext.models.attention import AttentionContext, MaskedAttention
from hildanext.models.bidirectional import DiffusionModel
from hildanext.runtime import send

Commit = Literal["auto", "fused", "separate"]
Kind = Literal["denoise", "revise"]

PREFILL_TOKENS = 1024
"""A longer prompt is fed in several forwards, so that the mask stays small."""


@dataclass(eq=False)
class Row:
    """One document. Forwards are counted for the row: those in which it took part."""

    index: int
    """Which prompt this is, whatever has left since."""
    prompt: int
    """Tokens of the prompt: they are never written."""
    limit: int
    """The row ends once this many tokens are final."""
    start: int
    """First position of the active block; everything before it is final."""
    tokens: Int[Tensor, " capacity"]
    """The document in whole blocks, masks where nothing is written yet."""
    uniform: Float[Tensor, " capacity"]
    boundary: Float[Tensor, "blocks hidden"]
    """Clean hidden state before each block; zeros before the first."""
    cache: BlockCache | None
    """None runs every forward from position 0 on."""
    checks: int = 0
    prefill: int = 0
    denoise: int = 0
    commit: int = 0
    revise: int = 0
    edits: int = 0

    @property
    def cached(self) -> int:
        """Tokens whose keys and values are kept."""
        return 0 if self.cache is None else self.cache.length


@dataclass(frozen=True)
class Step:
    """What one forward did to one row. Positions are absolute in the document."""

    row: int
    forward: int
    start: int
    kind: Kind
    masks: list[int]
    """Masked positions before the step."""
    drafts: list[tuple[int, int, float]] = field(default_factory=list)
    """Filled masks: position, token, probability."""
    edits: list[tuple[int, int, int, float]] = field(default_factory=list)
    """Rewritten tokens: position, old token, new token, probability."""
    final: bool = False
    """True where the block was finished by this step."""


class BlockSession:
    """A `Denoiser` for `model`. `ended(row, tokens)` is asked whenever a block of a row is final.

    `observe` gets a `Step` for each row and forward; without it nothing is read back but a few flags per row.
    """

    def __init__(
        self,
        model: DiffusionModel,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        ended: Callable[[Row, list[int]], bool],
        *,
        seeds: Sequence[int] | None = None,
        commit: Commit = "auto",
        cached: bool = True,
        observe: Callable[[Step], None] | None = None,
        debug: bool = False,
    ) -> None:
        self.model, self.card = model, model.card
        self.block = model.card.block_size
        self.commit_mode, self.observe, self.ended = commit, observe, ended
        self.cached, self.debug = cached, debug
        self.rows: list[Row] = []
        """Those that denoise: the rows of the canvas, in its order."""
        self.joining: list[Row] = []
        """Those whose prompts are not in their caches yet."""
        self.prefill_budget: int | None = None
        """With every forward, feed at most so many tokens of joining prompts; None: only `prefill` feeds them."""
        # Under the left shift a block of one token is predicted by the clean token before it alone.
        self.noisy = 0 if self.card.shift == "left" and self.block == 1 else self.block
        self._offset = torch.arange(self.block, device=model.device)[None, :]
        self._finished: list[Row] = []
        seeds = seeds if seeds is not None else range(len(prompts))
        for index, (prompt, limit, seed) in enumerate(zip(prompts, limits, seeds, strict=True)):
            self.join(self.row(prompt, limit, seed, index))

    def row(self, prompt: Sequence[int], limit: int, seed: int, index: int) -> Row:
        """A document that is to have `limit` tokens; its cache is allocated here."""
        model, capacity = self.model, -(-limit // self.block) * self.block
        tokens = torch.full((capacity,), self.card.mask_id)
        tokens[: len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
        hidden = model.causal_lm.config.hidden_size
        return Row(
            index,
            len(prompt),
            limit,
            len(prompt) // self.block * self.block,
            tokens.to(model.device, non_blocking=True),
            uniforms(seed, capacity).to(model.device, non_blocking=True),
            torch.zeros(capacity // self.block + 1, hidden, dtype=model.dtype, device=model.device),
            BlockCache.of(model, capacity, self.debug) if self.cached else None,
        )

    def join(self, row: Row) -> None:
        """Let a row take part from the next canvas on, or from when its prompt is fed."""
        (self.joining if self._unfed(row) > 0 else self.rows).append(row)

    def leave(self, row: Row) -> None:
        """Let a row rest between two steps. It keeps all it has, and goes on where it was once it joins again."""
        for rows in (self.rows, self.joining, self._finished):
            if row in rows:
                rows.remove(row)

    def prefill(self) -> None:
        """Put the whole blocks of every prompt into the caches."""
        while self.joining:
            self.prefill_step(PREFILL_TOKENS * len(self.joining))

    def prefill_step(self, budget: int) -> None:
        """One forward that feeds at most about `budget` tokens of joining prompts, first come first served."""
        self._forward(self._prefills(budget))
        self.settle()

    def settle(self) -> list[Row]:
        """Ask of rows with a finished block whether they have ended, and let those go; rows whose prompt is fed begin.

        Returns those that have ended.
        """
        texts = _texts(self._finished)
        ended = [row for row, text in zip(self._finished, texts, strict=True) if self.ended(row, text)]
        ended += [row for row in self._finished if row not in ended and row.start >= row.limit]
        self._finished = []
        fed = [row for row in self.joining if self._unfed(row) == 0]
        self.joining = [row for row in self.joining if row not in fed]
        self.rows = [row for row in self.rows if row not in ended] + fed
        return ended

    def canvas(self) -> Canvas | None:
        self.settle()
        if not self.rows:
            return None
        spans = [slice(row.start, row.start + self.block) for row in self.rows]
        tokens = torch.stack([row.tokens[span] for row, span in zip(self.rows, spans, strict=True)])
        uniform = torch.stack([row.uniform[span] for row, span in zip(self.rows, spans, strict=True)])
        facts = send([(row.start, row.prompt, row.checks) for row in self.rows], tokens.device)
        self._places = facts[:, :1] + self._offset
        fixed = self._places < facts[:, 1:2]
        masked = (tokens == self.card.mask_id) & ~fixed
        self._canvas = Canvas(tokens, masked, fixed, uniform, facts[:, 2])
        return self._canvas

    def logits(self, where: Bool[Tensor, "batch block"]) -> Float[Tensor, "rows vocab"]:
        pending = [row.start - row.cached for row in self.rows]
        if self.commit_mode == "separate" and self.cached and max(pending) > 0:
            self._forward([(row, Run(row.cached, new, 0)) for row, new in zip(self.rows, pending, strict=True)])
            for row, fed in zip(self.rows, pending, strict=True):
                row.commit += fed > 0
            pending = [0] * len(pending)
        runs = [Run(row.cached, new, self.noisy) for row, new in zip(self.rows, pending, strict=True)]
        feeds = list(zip(self.rows, runs, strict=True))
        prompts = self._prefills(self.prefill_budget) if self.prefill_budget is not None else []
        hidden = self._forward(feeds + prompts)
        for row, run in feeds:
            row.denoise += run.width > 0
        return self._read(hidden, feeds, self._canvas.places(where))

    def write(self, edit: Edit) -> None:
        canvas = self._canvas
        written = canvas.apply(edit)
        edits = (edit.write & ~canvas.masked).sum(-1)
        flags = torch.stack([edit.final, canvas.masked.any(-1), edit.write.any(-1), edits], -1).tolist()
        if self.observe is not None:
            for step in steps(self.rows, canvas, edit, self._places, "denoise"):
                self.observe(step)
        for row, tokens, (final, had_masks, wrote, edited) in zip(self.rows, written, flags, strict=True):
            row.tokens[row.start : row.start + self.block] = tokens
            row.edits += edited
            row.checks += not had_masks
            if not final:
                continue
            row.start, row.checks = row.start + self.block, 0
            self._finished.append(row)
            same = not had_masks and not wrote and self.card.clean_mask == "block_causal"
            if same and row.cache is not None and self.commit_mode == "auto":
                row.cache.commit(row.start, row.tokens)

    def revise(self, window: int, edit: EditRule, row: Row | None = None) -> None:
        """As `Denoiser.revise`; `row` offers the blocks of one row alone."""
        for one in self._finished if row is None else [row]:
            first = max(one.prompt // self.block * self.block, one.start - (window + 1) * self.block)
            if first < one.start - self.block:
                self._revise_row(one, first, edit)

    def finished(self, row: Row) -> bool:
        """Whether the row's last step ended a block."""
        return row in self._finished

    def _revise_row(self, row: Row, first: int, edit: EditRule) -> None:
        """Read finished blocks from `first` on as one noisy block, edit all but the newest, run again what changed."""
        run = Run(first, 0, row.start - first) if row.cache is not None else Run(0, first, row.start - first)
        kept = None if row.cache is None else row.cache.snapshot(first, row.cache.length)
        hidden = self._forward([(row, run)])
        if row.cache is not None and kept is not None:
            row.cache.restore(first, kept)
        row.revise += 1
        places = torch.arange(first, row.start, device=row.tokens.device)[None, :]
        tokens = row.tokens[None, first : row.start]
        fixed = (places < row.prompt) | (places >= row.start - self.block)
        nothing = torch.zeros_like(fixed)
        uniform = row.uniform[None, first : row.start]
        canvas = Canvas(tokens, nothing, fixed, uniform, torch.zeros(1, dtype=torch.int64, device=tokens.device))
        where = canvas.read(canvas.editable)
        change = edit(self._read(hidden, [(row, run)], canvas.places(where)), where, canvas)
        if self.observe is not None:
            self.observe(steps([row], canvas, change, places, "revise")[0])
        changed = [place for place, wrote in enumerate(change.write[0].tolist()) if wrote]
        if not changed:
            return
        row.tokens[first : row.start] = canvas.apply(change)[0]
        row.edits += len(changed)
        if row.cache is not None:
            row.cache.truncate(min(row.cache.length, (first + changed[0]) // self.block * self.block))

    def _unfed(self, row: Row) -> int:
        """Tokens of the prompt's whole blocks that are still to be prefilled."""
        return row.start - row.cached if self.cached and row.start <= row.prompt else 0

    def _prefills(self, budget: int) -> list[tuple[Row, Run]]:
        """What joining rows feed within a budget of tokens: whole blocks, one at least."""
        feeds: list[tuple[Row, Run]] = []
        for row in self.joining:
            chunk = max(min(budget, PREFILL_TOKENS) // self.block, not feeds) * self.block
            if chunk == 0:
                break
            run = Run(row.cached, min(chunk, self._unfed(row)), 0)
            feeds.append((row, run))
            row.prefill += 1
            budget -= run.width
        return feeds

    def _forward(self, feeds: Sequence[tuple[Row, Run]]) -> Float[Tensor, "fed hidden"]:
        """Hidden states of the fed tokens, the rows' runs one behind another; commits the clean ones."""
        feeds = [(row, run) for row, run in feeds if run.width > 0]
        if not feeds:
            hidden_size = self.model.causal_lm.config.hidden_size
            return torch.zeros(0, hidden_size, dtype=self.model.dtype, device=self.model.device)
        runs = [run for _, run in feeds]
        tokens = torch.cat([row.tokens[run.start : run.extent] for row, run in feeds])[None]
        caches = [row.cache for row, _ in feeds if row.cache is not None]
        if caches:
            for row, _ in feeds:
                assert row.cache is not None
                row.cache.verify(row.tokens)
            context = CachedAttention(caches, runs)
            attention: AttentionContext = context
            positions = context.positions
        else:
            positions = positions_of(runs, tokens.device)
            attention = MaskedAttention(masks.among(rows_of(runs, tokens.device), self.block, self.card.clean_mask))
        hidden = self.model(self.model.embed(tokens), positions, attention)[0]
        begin = 0
        for row, run in feeds:
            if run.clean > 0:
                block = run.start // self.block + 1
                lasts = hidden[begin + self.block - 1 : begin + run.clean : self.block]
                row.boundary[block : block + len(lasts)] = lasts
                if row.cache is not None:
                    row.cache.commit(run.start + run.clean, row.tokens)
            begin += run.width
        return hidden

    def _read(
        self,
        hidden: Float[Tensor, "fed hidden"],
        feeds: Sequence[tuple[Row, Run]],
        places: tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]],
    ) -> Float[Tensor, "rows vocab"]:
        """Logits that predict the positions at `places` (see `Canvas.places`) of the noisy runs, from the forward
        that fed `feeds` first."""
        begins, begin = [], 0
        for _, run in feeds:
            begins.append(begin + run.clean)
            begin += run.width
        row, place = places
        index = send(begins, hidden.device)[row] + place
        if self.card.shift == "left":  # one state further left; where nothing clean was fed, the boundary
            before = torch.stack([one.boundary[(run.start + run.clean) // self.block] for one, run in feeds])
            index = torch.where(place == 0, row, index + len(before) - 1)
            hidden = torch.cat([before, hidden])
        return self.model.logits(hidden[index])


def _texts(rows: Sequence[Row]) -> list[list[int]]:
    """The final tokens of each row; the host waits once for all of them."""
    if not rows:
        return []
    text: list[int] = torch.cat([row.tokens[: row.start] for row in rows]).tolist()
    ends = list(accumulate(row.start for row in rows))
    return [text[end - row.start : end] for row, end in zip(rows, ends, strict=True)]


def steps(
    rows: Sequence[Row], canvas: Canvas, edit: Edit, places: Int[Tensor, "batch block"], kind: Kind
) -> list[Step]:
    """What an edit does to each row, in plain numbers."""
    final = edit.final[:, None].expand_as(edit.write)
    whole = torch.stack([places.expand_as(edit.tokens), canvas.tokens, canvas.masked, edit.write, edit.tokens, final])
    columns: list[Any] = [*whole.tolist(), edit.confidence.tolist()]
    found = []
    for r, row in enumerate(rows):
        cells = list(zip(*(column[r] for column in columns), strict=True))
        found.append(
            Step(
                row=row.index,
                forward=row.denoise + row.revise,
                start=cells[0][0],
                kind=kind,
                masks=[place for place, _, masked, *_ in cells if masked],
                drafts=[(place, new, p) for place, _, masked, write, new, _, p in cells if write and masked],
                edits=[(place, old, new, p) for place, old, masked, write, new, _, p in cells if write and not masked],
                final=bool(cells[0][5]),
            )
        )
    return found
