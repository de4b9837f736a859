"""The model's side of decoding: documents that each denoise their own active block, all in one forward.

Rows advance independently, join (`add`) and leave (`remove`) whenever they like; a forward feeds the tokens of all of
them one behind another, unpadded. What is fed is `feed_plan`'s, what is committed to a cache `commit`'s.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hildanext import masks
from hildanext.core.errors import LogitsNotFinite
from hildanext.core.runtime import send
from hildanext.decoding.base import Canvas, Edit, EditRule, Ends
from hildanext.decoding.block_size_one import block_size_one_logits
from hildanext.decoding.commit import Commit, CommitPolicy
from hildanext.decoding.feed_plan import Feed, active_blocks, prompt_pieces, revised_blocks
from hildanext.decoding.sequence import SequenceState, Step, steps
from hildanext.decoding.trajectory import record
from hildanext.kv_cache import BlockCache, CachedAttention, positions_of, rows_of
from hildanext.kv_cache.prune import Prune
from hildanext.kv_cache.prune.pruned_cache import open_cache
from hildanext.models.attention import PREFILL_TOKENS
from hildanext.models.attention.dense import AttentionContext, MaskedAttention
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.sampling import uniforms
from hildanext.models.soft_inputs import InputTable, SoftInputs


class DecodeState:
    """A `Denoiser` for `model`. `ended(row, tokens)` is asked whenever a block of a row is final.

    `observe` gets a `Step` for each row and forward; without it nothing is read back but a few flags per row. `prune`
    says what the rows' caches drop, `window` how many finished blocks may still be revised then.
    """

    def __init__(
        self,
        model: DiffusionModel,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        ended: Callable[[SequenceState, list[int]], bool],
        *,
        seeds: Sequence[int] | None = None,
        commit: Commit = "auto",
        cached: bool = True,
        observe: Callable[[Step], None] | None = None,
        debug: bool = False,
        prune: Prune | None = None,
        window: int = 0,
    ) -> None:
        self.model, self.card = model, model.card
        self.block = model.card.block_size
        self.commit_policy = CommitPolicy(commit, self.block, model.card.clean_mask)
        self.observe, self.ended = observe, ended
        self.cached, self.debug = cached, debug
        self.rows: list[SequenceState] = []
        """Those that denoise: the rows of the canvas, in its order."""
        self.joining: list[SequenceState] = []
        """Those whose prompts are not in their caches yet."""
        self.prefill_budget: int | None = None
        """With every forward, feed at most so many tokens of joining prompts; None: only `prefill` feeds them."""
        # Under the left shift a block of one token is predicted by the clean token before it alone.
        self.noisy = 0 if self.card.shift == "left" and self.block == 1 else self.block
        self._offset = torch.arange(self.block, device=model.device)[None, :]
        self._finished: list[SequenceState] = []
        seeds = seeds if seeds is not None else range(len(prompts))
        for index, (prompt, limit, seed) in enumerate(zip(prompts, limits, seeds, strict=True)):
            self.add(self.row(prompt, limit, seed, index, prune, window))

    def row(
        self,
        prompt: Sequence[int],
        limit: int,
        seed: int,
        index: int,
        prune: Prune | None = None,
        window: int = 0,
    ) -> SequenceState:
        """A document that is to have `limit` tokens; its cache is allocated here."""
        model, capacity = self.model, -(-limit // self.block) * self.block
        device = model.device
        tokens = torch.full((capacity,), self.card.mask_id)
        tokens[: len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
        hidden = model.causal_lm.config.hidden_size
        return SequenceState(
            index,
            len(prompt),
            limit,
            len(prompt) // self.block * self.block,
            tokens.to(device, non_blocking=True),
            uniforms(seed, capacity).to(device, non_blocking=True),
            torch.zeros(capacity // self.block + 1, hidden, dtype=model.dtype, device=device),
            open_cache(model, capacity, len(prompt), prune, window, self.debug) if self.cached else None,
            seed=seed,
        )

    def add(self, row: SequenceState) -> None:
        """Let a row take part from the next canvas on, or from when its prompt is fed."""
        (self.joining if row.unfed > 0 else self.rows).append(row)

    def fork(self, row: SequenceState, seed: int) -> SequenceState:
        """A copy of a row, with a cache of its own that holds the committed blocks; it draws by `seed` from here on.

        It takes part once it stands in `rows`. Between `logits` and `write` its active block has had the row's forward,
        and `canvas` is to be asked again, whose rows then are those in `rows`.
        """
        cache = None
        if row.cache is not None:
            cache = BlockCache.of(self.model, len(row.tokens), self.debug)
            cache.adopt(row.cache, row.cache.length, row.tokens)
        return replace(
            row,
            tokens=row.tokens.clone(),
            uniform=uniforms(seed, len(row.tokens)).to(row.uniform.device, non_blocking=True),
            last_clean_hidden=row.last_clean_hidden.clone(),
            cache=cache,
            seed=seed,
        )

    def remove(self, row: SequenceState) -> None:
        """Let a row rest between two steps. It keeps all it has, and goes on where it was once it is added again."""
        for rows in (self.rows, self.joining, self._finished):
            if row in rows:
                rows.remove(row)

    def prefill(self) -> None:
        """Put the whole blocks of every prompt into the caches."""
        while self.joining:
            self.prefill_step(PREFILL_TOKENS * len(self.joining))

    def prefill_step(self, budget: int) -> None:
        """One forward that feeds at most about `budget` tokens of joining prompts, first come first served."""
        pieces = self._prompt_pieces(budget)
        self.commit_policy.fed(pieces, self._forward(pieces))
        self.retire_finished()

    def retire_finished(self) -> list[SequenceState]:
        """Ask of rows with a finished block whether they have ended, and let those go; rows whose prompt is fed begin.

        Returns those that have ended.
        """
        texts = _texts(self._finished)
        ended = [row for row, text in zip(self._finished, texts, strict=True) if self.ended(row, text)]
        ended += [row for row in self._finished if row not in ended and row.start >= row.limit]
        self._finished = []
        fed = [row for row in self.joining if row.unfed == 0]
        self.joining = [row for row in self.joining if row not in fed]
        self.rows = [row for row in self.rows if row not in ended] + fed
        return ended

    def canvas(self) -> Canvas | None:
        self.retire_finished()
        if not self.rows:
            return None
        spans = [slice(row.start, row.start + self.block) for row in self.rows]
        tokens = torch.stack([row.tokens[span] for row, span in zip(self.rows, spans, strict=True)])
        uniform = torch.stack([row.uniform[span] for row, span in zip(self.rows, spans, strict=True)])
        facts = send([(row.start, row.prompt, row.checks) for row in self.rows], tokens.device)
        self._places = facts[:, :1] + self._offset
        fixed = self._places < facts[:, 1:2]
        for number, (row, span) in enumerate(zip(self.rows, spans, strict=True)):
            if row.given is not None:
                fixed[number] |= row.given[span]
        masked = (tokens == self.card.mask_id) & ~fixed
        ends = self._ends(facts[:, 1:2])
        limits = self._behind_limits()
        masked = masked if limits is None else masked & ~limits
        closed, shut = limits, None
        if ends is not None and any(row.may_end for row in self.rows):
            behind = ends.behind(tokens, masked)
            closed = behind if limits is None else limits | behind
            masked, shut = masked & ~behind, masked & behind
        told = tuple(row.facts for row in self.rows)
        memory = tuple(row.memory for row in self.rows) if any(row.memory is not None for row in self.rows) else ()
        checks = facts[:, 2]
        self._canvas = Canvas(tokens, masked, fixed, uniform, checks, told, memory, closed, shut, ends)
        return self._canvas

    def _ends(self, prompts: Int[Tensor, "batch 1"]) -> Ends | None:
        """What ends the rows' texts; None where nothing does."""
        ids = frozenset[int]().union(*(row.eos for row in self.rows))
        if not ids:
            return None
        own = self._places >= prompts
        if not all(row.eos for row in self.rows):
            own = own & send([[bool(row.eos)] for row in self.rows], own.device)
        return Ends(send(sorted(ids), own.device), own)

    def _behind_limits(self) -> Bool[Tensor, "batch block"] | None:
        """Positions behind the rows' limits; None: there are none."""
        if not any(row.limit < row.start + self.block for row in self.rows):
            return None
        return self._places >= send([[row.limit] for row in self.rows], self._places.device)

    def input_table(self) -> InputTable:
        return self.model.input_table

    def logits(self, where: Bool[Tensor, "batch block"], soft: SoftInputs | None = None) -> Float[Tensor, "rows vocab"]:
        ahead = self.commit_policy.ahead(self.rows)
        if ahead:
            self.commit_policy.fed(ahead, self._forward(ahead))
        for row, segment in ahead:
            row.commit += 1
            row.rows += segment.num_tokens
        feeds = active_blocks(self.rows, self.noisy)
        pieces = self._prompt_pieces(self.prefill_budget) if self.prefill_budget is not None else []
        hidden = self._forward(feeds + pieces, None if soft is None else self._laid(soft, feeds, feeds + pieces))
        self.commit_policy.fed(feeds + pieces, hidden)
        for row, segment in feeds:
            row.denoise += segment.num_tokens > 0
            row.rows += segment.num_tokens
        return self._read(hidden, feeds, self._canvas.places(where))

    def causal_logits(
        self, tokens: Int[Tensor, "batch block"], where: Bool[Tensor, "batch block"]
    ) -> Float[Tensor, "rows vocab"]:
        for row, asked in zip(self.rows, where.any(-1).tolist(), strict=True):
            row.denoise += asked
        return block_size_one_logits(self.model, self.rows, tokens, where)

    def write(self, edit: Edit) -> list[int]:
        canvas = self._canvas
        written = canvas.apply(edit)
        edits = (edit.write & ~canvas.masked).sum(-1)
        told = edit.confidence.isfinite().all(-1)
        ended = torch.zeros_like(edit.final) if canvas.ends is None else canvas.ends.stand_in(written)
        cut = torch.zeros_like(edit.final) if canvas.closed is None else canvas.closed.any(-1)
        flags = torch.stack(
            [edit.final, canvas.masked.any(-1), edit.write.any(-1), edits, ended, cut, told], -1
        ).tolist()
        untold = [row.index for row, flag in zip(self.rows, flags, strict=True) if not flag[-1]]
        if untold:
            raise LogitsNotFinite("diffusion model", untold)
        if self.observe is not None:
            for taken in steps(self.rows, canvas, edit, self._places, "denoise"):
                self.observe(taken)
        if edit.chances is not None:
            record([(row.recorder, row.start) for row in self.rows], canvas, edit, edit.chances)
        finished = []
        for number, (row, tokens, (final, had_masks, wrote, edited, ends, closed, _)) in enumerate(
            zip(self.rows, written, flags, strict=True)
        ):
            row.tokens[row.start : row.start + self.block] = tokens
            row.edits += edited
            row.checks += not had_masks
            row.memory = edit.memory[number] if edit.memory and not final else None
            row.may_end = bool(ends) and not final
            if final:
                row.start, row.checks = row.start + self.block, 0
                # What is closed was never written: such a block is the text's last, and nobody else's.
                self.commit_policy.finished(row, unchanged=not had_masks and not wrote and not closed)
                self._finished.append(row)
                finished.append(number)
        return finished

    def revise(self, window: int, edit: EditRule, rows: Sequence[int]) -> None:
        for row in [self.rows[number] for number in rows]:
            first = max(row.prompt // self.block * self.block, row.start - (window + 1) * self.block)
            if first < row.start - self.block:
                self._revise_row(row, first, edit)

    def _revise_row(self, row: SequenceState, first: int, edit: EditRule) -> None:
        """Read finished blocks from `first` on as one noisy block, edit all but the newest; what changed runs again."""
        feeds = [revised_blocks(row, first)]
        kept = None if row.cache is None else row.cache.snapshot(first, row.cache.length)
        hidden = self._forward(feeds)
        self.commit_policy.fed(feeds, hidden)
        if row.cache is not None and kept is not None:
            row.cache.restore(first, kept)
        row.revise += 1
        row.rows += feeds[0].segment.num_tokens
        places = torch.arange(first, row.start, device=row.tokens.device)[None, :]
        tokens = row.tokens[None, first : row.start]
        fixed = (places < row.prompt) | (places >= row.start - self.block)
        nothing = torch.zeros_like(fixed)
        uniform = row.uniform[None, first : row.start]
        canvas = Canvas(tokens, nothing, fixed, uniform, torch.zeros(1, dtype=torch.int64, device=tokens.device))
        where = canvas.read(canvas.editable)
        change = edit(self._read(hidden, feeds, canvas.places(where)), where, canvas)
        if self.observe is not None:
            self.observe(steps([row], canvas, change, places, "revise")[0])
        changed = [place for place, wrote in enumerate(change.write[0].tolist()) if wrote]
        if not changed:
            return
        row.tokens[first : row.start] = canvas.apply(change)[0]
        row.edits += len(changed)
        if row.cache is not None:
            row.cache.truncate(min(row.cache.length, (first + changed[0]) // self.block * self.block))

    def _prompt_pieces(self, budget: int) -> list[Feed]:
        pieces = prompt_pieces(self.joining, budget, self.block)
        for row, _ in pieces:
            row.prefill += 1
        return pieces

    def _laid(self, soft: SoftInputs, active: Sequence[Feed], fed: Sequence[Feed]) -> SoftInputs | None:
        """The soft inputs of the canvas's masks where a forward of `fed` feeds them, nothing anywhere else. The
        `active` blocks are fed first; None where none is."""
        if self.noisy == 0:
            return None
        begins = accumulate((segment.num_tokens for _, segment in active), initial=0)
        firsts = [begin + segment.clean for begin, (_, segment) in zip(begins, active, strict=False)]
        index = (send(firsts, soft.weight.device)[:, None] + self._offset).flatten()
        count = sum(segment.num_tokens for _, segment in fed)
        weight = soft.weight.masked_fill(~self._canvas.masked, 0.0)
        return SoftInputs(
            weight.new_zeros(count).index_copy(0, index, weight.flatten())[None],
            soft.states.new_zeros(count, soft.states.shape[-1]).index_copy(0, index, soft.states.flatten(0, 1))[None],
        )

    def _forward(self, feeds: Sequence[Feed], soft: SoftInputs | None = None) -> Float[Tensor, "fed hidden"]:
        """Hidden states of the fed tokens, the rows' segments one behind another. Commits nothing.

        Unpadded: some row has a block to commit in nearly every forward; a rectangle would be twice as wide for all.
        """
        feeds = [feed for feed in feeds if feed.segment.num_tokens > 0]
        if not feeds:
            hidden_size = self.model.causal_lm.config.hidden_size
            return torch.zeros(0, hidden_size, dtype=self.model.dtype, device=self.model.device)
        segments = [segment for _, segment in feeds]
        tokens = torch.cat([row.tokens[segment.start : segment.end] for row, segment in feeds])[None]
        caches = [row.cache for row, _ in feeds if row.cache is not None]
        if caches:
            for row, cache in zip((row for row, _ in feeds), caches, strict=True):
                cache.verify(row.tokens)
            context = CachedAttention(caches, segments)
            attention: AttentionContext = context
            positions = context.positions
        else:
            positions = positions_of(segments, tokens.device)
            attention = MaskedAttention(masks.among(rows_of(segments, tokens.device), self.block, self.card.clean_mask))
        if soft is not None:
            return self.model.hidden(tokens, positions, attention, soft)[0]
        return self.model.hidden(tokens, positions, attention)[0]

    def _read(
        self,
        hidden: Float[Tensor, "fed hidden"],
        feeds: Sequence[Feed],
        places: tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]],
    ) -> Float[Tensor, "rows vocab"]:
        """Logits that predict the positions at `places` (see `Canvas.places`) of the noisy segments; `feeds` came
        first in their forward."""
        begins, begin = [], 0
        for _, segment in feeds:
            begins.append(begin + segment.clean)
            begin += segment.num_tokens
        row, place = places
        index = send(begins, hidden.device)[row] + place
        if self.card.shift == "left":  # one state further left; where nothing clean was fed, the boundary
            before = torch.stack(
                [fed.last_clean_hidden[(segment.start + segment.clean) // self.block] for fed, segment in feeds]
            )
            index = torch.where(place == 0, row, index + len(before) - 1)
            hidden = torch.cat([before, hidden])
        return self.model.logits(hidden[index])


def _texts(rows: Sequence[SequenceState]) -> list[list[int]]:
    """The final tokens of each row; the host waits once for all of them."""
    if not rows:
        return []
    text: list[int] = torch.cat([row.tokens[: row.start] for row in rows]).tolist()
    ends = list(accumulate(row.start for row in rows))
    return [text[end - row.start : end] for row, end in zip(rows, ends, strict=True)]


__all__ = ["Commit", "DecodeState", "SequenceState", "Step"]
