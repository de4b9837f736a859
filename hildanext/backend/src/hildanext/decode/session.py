"""The model's side of decoding: a batch of documents, each denoising its own active block over the block cache.

Rows advance independently and leave the batch when they end. A finished block enters the cache as clean rows of
the next forward ("fused"), of a forward of its own ("separate"), or with no work at all where the block-causal
rule makes its last, unchanged forward the same thing ("auto", fused otherwise). `parent` alignment reads the first
token of a block from the clean hidden state before it, kept in `boundary`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hildanext.decode.base import Canvas, Edit, EditRule
from hildanext.decode.sampling import uniforms
from hildanext.kv import BlockCache, Segment
from hildanext.models.attention import AttentionContext, MaskedAttention
from hildanext.models.bidirectional import DiffusionModel

Commit = Literal["auto", "fused", "separate"]
Kind = Literal["denoise", "revise"]

PREFILL_TOKENS = 1024
"""A longer prompt is fed in several forwards, so that the mask stays small."""


@dataclass
class Row:
    """One document. Forwards are counted for the row: those in which it took part."""

    index: int
    """Which prompt of the batch this is, whatever has left since."""
    prompt: int
    """Tokens of the prompt: they are never written."""
    limit: int
    """The row ends once this many tokens are final."""
    start: int
    """First position of the active block; everything before it is final."""
    checks: int = 0
    prefill: int = 0
    denoise: int = 0
    commit: int = 0
    revise: int = 0
    edits: int = 0


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
        self.commit_mode, self.cached, self.observe, self.ended = commit, cached, observe, ended
        self.capacity = max(-(-limit // self.block) for limit in limits) * self.block
        self.rows = [
            Row(index, len(prompt), limit, len(prompt) // self.block * self.block)
            for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
        ]
        tokens = torch.full((len(prompts), self.capacity), self.card.mask_id)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        self.tokens = tokens.to(model.device)
        seeds = seeds if seeds is not None else range(len(prompts))
        self.uniform = torch.stack([uniforms(seed, self.capacity) for seed in seeds]).to(model.device)
        self.cache = BlockCache.of(model, len(prompts), self.capacity if cached else 0, debug)
        hidden = model.causal_lm.config.hidden_size
        blocks = self.capacity // self.block + 1
        self.boundary = torch.zeros(len(prompts), blocks, hidden, dtype=model.dtype, device=model.device)
        # Under the left shift a block of one token is predicted by the clean token before it alone.
        self.noisy = 0 if self.card.shift == "left" and self.block == 1 else self.block
        self._offset = torch.arange(self.block, device=model.device)[None, :]
        self._finished: list[int] = []
        self._place()

    def prefill(self) -> None:
        """Put the whole blocks of every prompt into the cache."""
        chunk = max(PREFILL_TOKENS // self.block, 1) * self.block
        while self.cached:
            clean = [min(chunk, row.start - done) for row, done in zip(self.rows, self.cache.lengths, strict=True)]
            if max(clean) == 0:
                return
            self._forward(clean, 0)
            for row, fed in zip(self.rows, clean, strict=True):
                row.prefill += fed > 0

    def canvas(self) -> Canvas | None:
        ending = {r for r in self._finished if self._has_ended(r)}
        self._finished = []
        if ending:
            self._keep([r for r in range(len(self.rows)) if r not in ending])
        if not self.rows:
            return None
        tokens = self.tokens.gather(1, self._places)
        fixed = self._places < self._prompts
        checks = torch.tensor([row.checks for row in self.rows], device=tokens.device)
        masked = (tokens == self.card.mask_id) & ~fixed
        self._canvas = Canvas(tokens, masked, fixed, self.uniform.gather(1, self._places), checks)
        return self._canvas

    def logits(self, where: Bool[Tensor, "batch block"]) -> Float[Tensor, "rows vocab"]:
        pending = [row.start - done for row, done in zip(self.rows, self.cache.lengths, strict=True)]
        if self.commit_mode == "separate" and self.cached and max(pending) > 0:
            self._forward(pending, 0)
            for row, fed in zip(self.rows, pending, strict=True):
                row.commit += fed > 0
            pending = [0] * len(pending)
        hidden = self._forward(pending, self.noisy)
        for row, fed in zip(self.rows, pending, strict=True):
            row.denoise += fed + self.noisy > 0
        return self._read(hidden, pending, where)

    def write(self, edit: Edit) -> None:
        canvas = self._canvas
        self.tokens.scatter_(1, self._places, canvas.apply(edit))
        edits = (edit.write & ~canvas.masked).sum(-1)
        flags = torch.stack([edit.final, canvas.masked.any(-1), edit.write.any(-1), edits], -1).tolist()
        if self.observe is not None:
            for step in steps(self.rows, canvas, edit, self._places, "denoise"):
                self.observe(step)
        for r, (final, had_masks, wrote, edited) in enumerate(flags):
            row = self.rows[r]
            row.edits += edited
            row.checks += not had_masks
            if not final:
                continue
            row.start, row.checks = row.start + self.block, 0
            self._finished.append(r)
            same = not had_masks and not wrote and self.card.clean_mask == "block_causal"
            if same and self.cached and self.commit_mode == "auto":
                self.cache.commit(r, row.start, self.tokens[r])
        if self._finished:
            self._place()

    def revise(self, window: int, edit: EditRule) -> None:
        for r in self._finished:
            row = self.rows[r]
            first = max(row.prompt // self.block * self.block, row.start - (window + 1) * self.block)
            if first < row.start - self.block:
                self._revise_row(r, first, edit)

    def _revise_row(self, r: int, first: int, edit: EditRule) -> None:
        """Read finished blocks from `first` on as one noisy block, edit all but the newest, run again what changed."""
        row, width = self.rows[r], self.rows[r].start - first
        cache = self.cache.only(r)
        kept = cache.snapshot(first, cache.lengths[0])
        hidden = self._forward([0], width, [first], r, cache)
        cache.restore(first, kept)
        row.revise += 1
        places = torch.arange(first, row.start, device=self.tokens.device)[None, :]
        tokens = self.tokens[r : r + 1, first : row.start]
        fixed = (places < row.prompt) | (places >= row.start - self.block)
        nothing = torch.zeros_like(fixed)
        uniform = self.uniform[r : r + 1, first : row.start]
        canvas = Canvas(tokens, nothing, fixed, uniform, torch.zeros(1, dtype=torch.int64, device=tokens.device))
        change = edit(self._read(hidden, [0], canvas.editable, r, first), canvas.editable, canvas)
        if self.observe is not None:
            self.observe(steps([row], canvas, change, places, "revise")[0])
        changed = change.write[0].nonzero()[:, 0].tolist()
        if not changed:
            return
        self.tokens[r, first : row.start] = canvas.apply(change)[0]
        row.edits += len(changed)
        if self.cached:
            self.cache.truncate(r, min(self.cache.lengths[r], (first + changed[0]) // self.block * self.block))

    def _forward(
        self,
        clean: Sequence[int],
        noisy: int,
        start: Sequence[int] | None = None,
        only: int | None = None,
        cache: BlockCache | None = None,
    ) -> Float[Tensor, "batch width hidden"]:
        """Hidden states of `clean[r]` final tokens and `noisy` ones after them; commits the clean ones.

        `only` feeds one row of the batch, through `cache`.
        """
        first = 0 if only is None else only
        tokens = self.tokens if only is None else self.tokens[only : only + 1]
        begins = list(start if start is not None else self.cache.lengths)
        if max(clean) + noisy == 0:
            return self.boundary[:, :0]
        if self.cached:
            self.cache.verify(self.tokens)
            context = (cache if cache is not None else self.cache).context(clean, noisy, begins)
            attention: AttentionContext = context
            positions = context.positions
        else:
            clean = [begin + count for begin, count in zip(begins, clean, strict=True)]
            begins = [0] * len(clean)
            whole = Segment(tuple(begins), tuple(clean), noisy, self.block, self.card.clean_mask)
            positions, attention = _uncached(whole, tokens.device)
        fed = tokens.gather(1, positions.expand(len(tokens), -1))
        hidden = self.model(self.model.embed(fed), positions.expand(len(tokens), -1), attention)
        for r, (begin, count) in enumerate(zip(begins, clean, strict=True)):
            if count > 0:
                block = begin // self.block + 1
                lasts = hidden[r, self.block - 1 : count : self.block]
                self.boundary[first + r, block : block + len(lasts)] = lasts
                if self.cached:
                    self.cache.commit(first + r, begin + count, tokens[r])
        return hidden

    def _read(
        self,
        hidden: Float[Tensor, "batch width hidden"],
        clean: Sequence[int],
        where: Bool[Tensor, "batch block"],
        only: int | None = None,
        first: int | None = None,
    ) -> Float[Tensor, "rows vocab"]:
        """Logits that predict the positions at `where`, from a forward that fed `clean[r]` tokens before them."""
        row, place = where.nonzero(as_tuple=True)
        begins = [row.start for row in self.rows] if first is None else [first]
        skipped = torch.tensor(list(clean) if self.cached else begins, device=hidden.device)
        if self.card.shift == "left":  # one state further left; where nothing clean was fed, the boundary
            blocks = torch.tensor([begin // self.block for begin in begins], device=hidden.device)
            boundary = self.boundary if only is None else self.boundary[only : only + 1]
            before = boundary[torch.arange(len(blocks), device=hidden.device), blocks]
            hidden = torch.cat([before[:, None], hidden], 1)
        return self.model.logits(hidden[row, skipped[row] + place])

    def _has_ended(self, r: int) -> bool:
        row = self.rows[r]
        return self.ended(row, self.tokens[r, : row.start].tolist()) or row.start >= row.limit

    def _keep(self, rows: list[int]) -> None:
        if self.cached:
            self.cache.keep(rows)
        else:
            self.cache.lengths = [0] * len(rows)
        self.rows = [self.rows[r] for r in rows]
        self.tokens, self.uniform, self.boundary = self.tokens[rows], self.uniform[rows], self.boundary[rows]
        self._place()

    def _place(self) -> None:
        """Positions of the active blocks; a finished last block keeps its place inside the canvas."""
        device = self.tokens.device
        last = self.capacity - self.block
        starts = torch.tensor([min(row.start, last) for row in self.rows], dtype=torch.int64, device=device)
        self._places = starts[:, None] + self._offset
        self._prompts = torch.tensor([row.prompt for row in self.rows], dtype=torch.int64, device=device)[:, None]


def _uncached(segment: Segment, device: torch.device) -> tuple[Int[Tensor, "batch width"], MaskedAttention]:
    """The reference without a cache: every token from position 0 on, in one masked forward."""
    positions, padding = segment.positions(device)
    return positions, MaskedAttention(segment.may_attend(positions, padding))


def steps(
    rows: Sequence[Row], canvas: Canvas, edit: Edit, places: Int[Tensor, "batch block"], kind: Kind
) -> list[Step]:
    """What an edit does to each row, in plain numbers."""
    fields: tuple[Any, ...] = (places, canvas.tokens, canvas.masked, edit.write, edit.tokens, edit.confidence)
    columns = [field.tolist() for field in fields]
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
                drafts=[(place, new, p) for place, _, masked, write, new, p in cells if write and masked],
                edits=[(place, old, new, p) for place, old, masked, write, new, p in cells if write and not masked],
                final=bool(edit.final[r]),
            )
        )
    return found
