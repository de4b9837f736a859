"""A network in ONNX Runtime: plain rows in one graph, exact mode's mask rows behind them in another, the head apart."""

from collections.abc import Hashable, Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from hildanext.core.errors import CheckpointError
from hildanext.core.json_text import parse
from hildanext.decoding.exact.network import anchors_and_places
from hildanext.export.onnx_card import OnnxCard
from hildanext.export.onnx_layout import BOTH, CLEAN, DRAFT_HEAD, DRAFT_ROWS, HEAD, SAMPLER
from hildanext.kv_cache import BlockCache
from hildanext.kv_cache.block_cache import STRETCH, whole_stretches
from hildanext.kv_cache.draft_attention import DraftSegment
from hildanext.models.attention.dense import install_seam
from hildanext.models.loading.files import DTYPE, check_safetensors
from hildanext.models.loading.model_config import read_config
from hildanext.runtimes.onnx_session import BoundSession


class _Rows(BoundSession):
    """A graph of rows over a document's keys and values."""

    cache: BlockCache | None = None
    seen = 0

    def look_at(self, cache: BlockCache, seen: int) -> None:
        """Bind the first `seen` slots of every layer, to be read and written in place."""
        if cache is self.cache and seen == self.seen:
            return
        self.cache, self.seen = cache, seen
        for part, whole in (("keys", cache.keys), ("values", cache.values)):
            layers, kv_heads, _, head_dim = whole.shape
            for layer in range(layers):
                # Slots come first in memory, and there are as many as the multiple that the cache was made for.
                slots = whole.as_strided(
                    (seen, kv_heads, head_dim), (kv_heads * head_dim, head_dim, 1), whole[layer].storage_offset()
                )
                self.bind(f"{part}.{layer}", slots)
                self.bind(f"{part}_out.{layer}", slots)


class OnnxNetwork:
    """A `Network` (see `decoding.exact.network`) of an exported folder."""

    device = torch.device("cpu")
    dtype = torch.float32
    """Of states and logits. Matrices are in 8 or 4 bits in quantised graphs."""
    rows_alone = True

    def __init__(self, folder: Path, card: OnnxCard, causal_lm: PreTrainedModel, threads: int) -> None:
        """`folder` holds what `export.onnx_file` wrote; `causal_lm` may be a skeleton on the meta device."""
        self.causal_lm, self.card, self.threads = causal_lm, card, threads
        self.places = card.drafts.places if card.drafts is not None else 0
        self.enter = card.drafts.enter if card.drafts is not None else 0
        self._inv_freq = torch.tensor(card.inv_freq)
        self._cos = self._sin = torch.zeros(0, len(card.inv_freq))
        self._clean = _Rows(folder / CLEAN, threads)
        self._head = BoundSession(folder / HEAD, threads)
        self._both = _Rows(folder / BOTH, threads) if self.places else None
        self.has_sampler = card.drafts is not None and card.drafts.sampler is not None
        self._draft_head = BoundSession(folder / DRAFT_HEAD, threads) if self.places else None
        self._sampler = BoundSession(folder / SAMPLER, threads) if self.has_sampler else None
        self._draft_rows, self._row_of = _draft_rows(folder / DRAFT_ROWS) if self.places else (torch.empty(0, 0),) * 2

    @property
    def costs_key(self) -> Hashable:
        words = len(self._draft_rows)
        return "onnx", self.card.dtype, self.enter, self.places, self.has_sampler, words, self.threads

    def new_cache(self, capacity: int) -> BlockCache:
        card = self.card
        return BlockCache(
            card.layers, card.kv_heads, capacity, card.head_dim,
            block_size=1, clean_mask="token_causal", slots_first=STRETCH,
        )  # fmt: skip

    def forward(
        self, tokens: Sequence[int], caches: Sequence[BlockCache], segments: Sequence[DraftSegment]
    ) -> Float[Tensor, "rows hidden"]:
        clean: list[Tensor] = []
        masks: list[Tensor] = []
        begin = 0
        for cache, segment in zip(caches, segments, strict=True):
            hidden = self._document(tokens[begin : begin + segment.clean], cache, segment)
            clean.append(hidden[: segment.clean])
            masks.append(hidden[segment.clean :])
            begin += segment.clean
        return torch.cat([*clean, *masks]) if len(clean) > 1 else hidden

    def _document(
        self, tokens: Sequence[int], cache: BlockCache, segment: DraftSegment
    ) -> Float[Tensor, "rows hidden"]:
        fed, positions = torch.tensor(tokens), torch.tensor(sum(segment.positions, []))
        if not segment.masks:
            return self.rows(fed, cache, segment.start, positions, segment.mask(self.device))
        session, clean = self._both, segment.clean
        assert session is not None, "masks need adapters"
        bias = self._feed(session, fed, cache, segment.start, positions, segment.mask(self.device))
        if self.enter:
            self._bind_rows(session, "clean_", positions[:clean], segment.start, bias[:clean].contiguous())
        anchors, places = anchors_and_places([segment])
        session.bind("anchors", torch.tensor(anchors))
        session.bind("places", torch.tensor(places))
        gate = torch.ones(1, len(positions), 1)
        gate[:, :clean] = 0.0
        session.bind("gate", gate)
        return self._states(session, len(positions))

    def rows(
        self,
        tokens: Int[Tensor, " rows"],
        cache: BlockCache,
        start: int,
        positions: Int[Tensor, " rows"],
        sees: Bool[Tensor, "rows slot"],
    ) -> Float[Tensor, "rows hidden"]:
        """Final states of plain rows of one document, which are written into its slots from `start` on and see what
        `sees` says of the slots up to theirs. Commits nothing."""
        if not len(tokens):
            return torch.zeros(0, self.card.hidden)
        self._feed(self._clean, tokens, cache, start, positions, sees)
        return self._states(self._clean, len(positions))

    def _feed(
        self, session: _Rows, tokens: Tensor, cache: BlockCache, start: int, positions: Tensor, sees: Tensor
    ) -> Float[Tensor, "rows seen"]:
        """Bind all but what masks need. Returns the bias."""
        rows, end = sees.shape
        seen = whole_stretches(end)
        session.look_at(cache, seen)
        session.bind("tokens", tokens.contiguous())
        bias = torch.full((rows, seen), float("-inf"))
        bias[:, :end].masked_fill_(sees, 0.0)
        self._bind_rows(session, "", positions, start, bias)
        return bias

    def _states(self, session: _Rows, rows: int) -> Float[Tensor, "rows hidden"]:
        hidden = torch.empty(1, rows, self.card.hidden)
        session.bind("hidden", hidden)
        session.run()
        return hidden[0]

    def _angles(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every position; a double's, so that they do not depend on how many are taken at once."""
        if len(self._cos) < positions:
            count = max(positions, 2 * len(self._cos), 512)
            angles = (torch.arange(count).float()[:, None] * self._inv_freq).double()
            self._cos, self._sin = (part.float() * self.card.rope_scale for part in (angles.cos(), angles.sin()))
        return self._cos, self._sin

    def _bind_rows(self, session: BoundSession, which: str, positions: Tensor, start: int, bias: Tensor) -> None:
        rows = len(positions)
        cos, sin = self._angles(int(positions.max()) + 1)
        session.bind(f"{which}order", torch.arange(rows)[None])
        session.bind(f"{which}cos", cos[positions])
        session.bind(f"{which}sin", sin[positions])
        session.bind(f"{which}slots", torch.arange(start, start + rows)[:, None])
        session.bind(f"{which}bias", bias.repeat_interleave(self.card.heads // self.card.kv_heads, 0))

    def shortlist(
        self, hidden: Float[Tensor, "*rows hidden"], count: int
    ) -> tuple[Int[Tensor, "*rows count"], Float[Tensor, "*rows count hidden"]]:
        assert self._draft_head is not None, "masks need adapters"
        rows = hidden.reshape(-1, self.card.hidden).contiguous()
        count = min(count, len(self._draft_rows))
        ids = torch.empty(len(rows), count, dtype=torch.long)
        self._draft_head.bind("hidden", rows)
        self._draft_head.bind("count", torch.tensor([count]))
        self._draft_head.bind("ids", ids)
        self._draft_head.run()
        ids = ids.view(*hidden.shape[:-1], count)
        return ids, self._draft_rows[self._row_of[ids]]

    def told(
        self, hidden: Float[Tensor, "*rows hidden"], before: Int[Tensor, "*rows"]
    ) -> Float[Tensor, "*rows hidden"]:
        if self._sampler is None:
            return hidden
        told = torch.empty(hidden.numel() // self.card.hidden, self.card.hidden)
        self._sampler.bind("hidden", hidden.reshape(told.shape).contiguous())
        self._sampler.bind("before", before.reshape(-1).contiguous())
        self._sampler.bind("told", told)
        self._sampler.run()
        return told.view(hidden.shape)

    def logits(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocab"]:
        rows = hidden.reshape(-1, self.card.hidden).contiguous()
        logits = torch.empty(len(rows), self.card.vocab)
        if len(rows):
            self._head.bind("hidden", rows)
            self._head.bind("logits", logits)
            self._head.run()
        return logits.view(*hidden.shape[:-1], self.card.vocab)


def _draft_rows(file: Path) -> tuple[Tensor, Tensor]:
    """Rows of the output matrix, and each token's place among them. Raises `CheckpointError`."""
    if not file.is_file():
        raise CheckpointError(f"{file} is not there", "export the model again")
    check_safetensors(file)
    tensors = load_file(file)
    if tensors.keys() != {"rows", "at"}:
        raise CheckpointError(f"{file} is of no export that this version reads", "export the model again")
    return tensors["rows"], tensors["at"]


def skeleton(folder: Path) -> PreTrainedModel:
    """The model's configuration and shapes, without weights."""
    model_config = read_config(parse((folder / "config.json").read_bytes()), folder)
    with torch.device("meta"):
        causal_lm: PreTrainedModel = AutoModelForCausalLM.from_config(
            model_config, attn_implementation=install_seam(), **{DTYPE: torch.float32}
        )
    if (folder / "generation_config.json").is_file():
        causal_lm.generation_config = GenerationConfig.from_pretrained(folder)
    return causal_lm
