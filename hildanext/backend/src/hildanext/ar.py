"""The autoregressive baseline: a parent's hidden states, exact likelihoods and KV-cached generation.

Runs on the same weights and through the same attention seam as the diffusion model, in the same process, so
that speeds and likelihoods compare like with like.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hildanext import masks
from hildanext.core.errors import PromptError
from hildanext.core.runtime import send
from hildanext.data.generation_result import FinishReason, GenerationResult, GenerationStats
from hildanext.detokenization import Detokenizer
from hildanext.models import HEAD_ROWS
from hildanext.models.attention import PREFILL_TOKENS
from hildanext.models.attention.dense import AttentionContext, MaskedAttention, grouped_attention, no_mask
from hildanext.models.sampling import next_tokens, read_tokens

ArResult = GenerationResult
"""The name under which it was promised. Of its forwards each has drawn one token; the prefill's is the first."""

Ended = Callable[[int, list[int]], bool]
OnResult = Callable[[int, GenerationResult], None]


@dataclass
class CausalCache:
    """Preallocated keys and values of a batch whose rows all have the same length, padding on the left included.

    A forward of n tokens appends n; several tokens at once see each other causally, and nobody sees padding.
    """

    batch: int
    capacity: int
    length: int = 0
    keys: list[Tensor] = field(default_factory=list)
    """One per layer, [batch kv_heads capacity head_dim]."""
    values: list[Tensor] = field(default_factory=list)
    pads: Int[Tensor, " batch"] | None = None
    """Columns of padding at the left of each row; None where there is none."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if layer == len(self.keys):
            shape = (self.batch, key.shape[1], self.capacity, key.shape[3])
            self.keys.append(key.new_empty(shape))
            self.values.append(value.new_empty(shape))
        new = key.shape[2]
        end = self.length + new
        self.keys[layer][:, :, self.length : end] = key
        self.values[layer][:, :, self.length : end] = value
        mask = self._mask(new, end, key.device) if new > 1 or self.pads is not None else None
        return grouped_attention(query, self.keys[layer][:, :, :end], self.values[layer][:, :, :end], mask, scale)

    def _mask(self, new: int, end: int, device: torch.device) -> Bool[Tensor, "#batch 1 new end"]:
        mask = torch.ones(new, end, dtype=torch.bool, device=device).tril(self.length)[None, None]
        if self.pads is None:
            return mask
        real = torch.arange(end, device=device) >= self.pads[:, None]
        itself = torch.eye(end, dtype=torch.bool, device=device)[-new:]  # so that no softmax row is empty
        return mask & (real[:, None, None, :] | itself)

    def keep_rows(self, rows: Int[Tensor, " rows"]) -> None:
        """Drop all but `rows` of the batch."""
        self.batch = len(rows)
        self.pads = None if self.pads is None else self.pads[rows]
        self.keys = [part[rows] for part in self.keys]
        self.values = [part[rows] for part in self.values]


class Parent:
    """An autoregressive model loaded by `load_parent`; a parent-aligned diffusion model's `causal_lm` serves too.

    Without a tokenizer it scores and generates, but knows no end of text.
    `banned` ids (shape [vocab], e.g. `DiffusionModel.banned`) get no probability: without them a grown
    matrix would spend some on the mask.
    """

    slots_first: int | None = None
    """How a runtime other than torch wants its caches laid out; see `kv_cache.BlockCache`."""

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        banned: Bool[Tensor, " vocab"] | None = None,
    ) -> None:
        self.causal_lm = causal_lm
        self.tokenizer = tokenizer
        self.banned = banned

    @property
    def head(self) -> Tensor:
        """The output matrix, shape [vocab hidden]."""
        return self.causal_lm.get_output_embeddings().weight

    @property
    def device(self) -> torch.device:
        return self.head.device

    @torch.no_grad()
    def hidden(
        self,
        tokens: Int[Tensor, "batch seq"],
        document: Int[Tensor, "batch seq"],
        position: Int[Tensor, "batch seq"],
    ) -> Float[Tensor, "batch seq hidden"]:
        """Final hidden states, causal inside each document; the state at i predicts token i+1. No gradient."""
        mask = masks.clean_only(document, position, 1, "token_causal")
        return self.forward(tokens, position, MaskedAttention(mask))

    def forward(
        self, tokens: Int[Tensor, "batch fed"], position: Int[Tensor, "batch fed"], attention: AttentionContext
    ) -> Float[Tensor, "batch fed hidden"]:
        """Final hidden states under any attention."""
        return self.causal_lm.model(
            input_ids=tokens,
            position_ids=position,
            attention_mask=no_mask(tokens.device),
            use_cache=False,
            hilda=attention,
        )[0]

    def logits(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocab"]:
        """Logits in fp32 (fp64 stays fp64), banned ids at -inf."""
        logits = self.causal_lm.get_output_embeddings()(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits if self.banned is None else logits.masked_fill(self.banned, float("-inf"))

    @torch.no_grad()
    def token_nll(
        self,
        tokens: Int[Tensor, "batch seq"],
        document: Int[Tensor, "batch seq"],
        position: Int[Tensor, "batch seq"],
        chunk: int = HEAD_ROWS,
    ) -> Float[Tensor, "batch seq"]:
        """Exact -log p(token | earlier tokens of its document) in nats; 0 at position 0 and at padding.

        The head is applied to `chunk` rows at a time. Where the tokens lie on the host, the result does too, and is
        the one thing that the host waits for.
        """
        rows, columns = ((position > 0) & (document >= 0)).nonzero(as_tuple=True)
        home = tokens.device
        tokens, document, position, rows, columns = (
            part.to(self.device, non_blocking=True) for part in (tokens, document, position, rows, columns)
        )
        hidden = self.hidden(tokens, document, position)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        nll = torch.zeros(tokens.shape, dtype=wide, device=tokens.device)
        for start in range(0, len(rows), chunk):
            row, column = rows[start : start + chunk], columns[start : start + chunk]
            logits = self.logits(hidden[row, column - 1])
            nll[row, column] = cross_entropy(logits, tokens[row, column], reduction="none")
        return nll.to(home)

    def generate(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
    ) -> GenerationResult:
        """Continue one prompt with a key-value cache; temperature 0 is greedy, `stop_ids` None is the tokenizer's EOS.

        Raises `PromptError` for an empty prompt or one that leaves no room.
        """
        return self.generate_batch([prompt_ids], max_new_tokens, temperature, top_p, top_k, [seed], stop_ids)[0]

    @torch.no_grad()
    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        seeds: Sequence[int] | None = None,
        stop_ids: Sequence[int] | None = None,
        ended: Ended | None = None,
        on_result: OnResult | None = None,
    ) -> list[GenerationResult]:
        """Continue prompts of any lengths together, padded on the left; a row's text does not depend on the others.

        `ended(i, tokens)` is asked after each token of prompt i whether its text is over; `on_result(i, result)` is
        told at once when it is. Prompt i draws from `seeds[i]`. Raises `PromptError` as `generate` does.
        """
        for prompt in prompts:
            self.check_length(len(prompt), max_new_tokens)
        stops = set(default_stops(self.tokenizer) if stop_ids is None else stop_ids)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds or [0] * len(prompts)]
        start = time.perf_counter()
        (*pieces, feed), cache = self._padded(prompts, max_new_tokens)
        for piece in pieces:
            self._fill(piece, cache)
        longest = max((len(prompt) for prompt in prompts), default=0)
        # A piece that holds only a row's padding is none of its forwards.
        prefills = [len(pieces) - (longest - len(prompt)) // PREFILL_TOKENS for prompt in prompts]
        tokens: list[list[int]] = [[] for _ in prompts]
        results: dict[int, GenerationResult] = {}
        active, prefill_seconds = list(range(len(prompts))), 0.0
        while active:
            logits = self._step(feed, cache)
            if not prefill_seconds:
                prefill_seconds = time.perf_counter() - start
            uniform = draw([generators[i] for i in active]).to(logits.device, non_blocking=True)
            choice = next_tokens(logits, uniform, temperature, top_p, top_k)
            going: list[int] = []
            for row, (i, token) in enumerate(zip(active, read_tokens(choice, active), strict=True)):
                tokens[i].append(token)
                reason: FinishReason | None = "eos" if token in stops else None
                if reason is None and len(tokens[i]) >= max_new_tokens:
                    reason = "length"
                elif reason is None and ended is not None and ended(i, tokens[i]):
                    reason = "stop"
                if reason is not None:
                    seconds = time.perf_counter() - start
                    results[i] = self._result(prompts[i], tokens[i], reason, prefills[i], seconds, prefill_seconds)
                    if on_result is not None:
                        on_result(i, results[i])
                else:
                    going.append(row)
            feed = choice[:, None]
            if len(going) < len(active):
                rows = send(going, feed.device, torch.long)
                active, feed = [active[row] for row in going], feed[rows]
                cache.keep_rows(rows)
        return [results[i] for i in range(len(prompts))]

    def _result(
        self,
        prompt: Sequence[int],
        tokens: list[int],
        reason: FinishReason,
        prefills: int,
        seconds: float,
        prefill_seconds: float,
    ) -> GenerationResult:
        shown = tokens[:-1] if reason == "eos" else tokens
        text = "" if self.tokenizer is None else Detokenizer(self.tokenizer, prompt).text(shown)
        # The prompt's last forward drew the first token: it counts as a decoding one, so that each token has one.
        stats = GenerationStats(
            prefill_forwards=prefills,
            denoise_forwards=len(tokens),
            tokens=len(tokens),
            seconds=seconds,
            prefill_seconds=prefill_seconds,
            rows=len(tokens),
        )
        return GenerationResult(tokens, text, reason, stats)

    def _padded(self, prompts: Sequence[Sequence[int]], new: int) -> tuple[list[Int[Tensor, "batch _"]], CausalCache]:
        """The prompts padded on the left, in the pieces that are fed one after the other, and a cache for them."""
        longest = max((len(prompt) for prompt in prompts), default=0)
        pads = [longest - len(prompt) for prompt in prompts]
        rows = [[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
        tokens = send(rows, self.device, torch.long)
        cache = CausalCache(len(prompts), longest + new)
        if any(pads):
            cache.pads = send(pads, self.device)
        return list(tokens.split(PREFILL_TOKENS, dim=1)), cache

    def _fill(self, feed: Int[Tensor, "batch new"], cache: CausalCache) -> Float[Tensor, "batch new hidden"]:
        new = feed.shape[1]
        position = torch.arange(cache.length, cache.length + new, device=feed.device).expand_as(feed)
        if cache.pads is not None:
            position = (position - cache.pads[:, None]).clamp_min(0)
        hidden = self.forward(feed, position, cache)
        cache.length += new
        return hidden

    def _step(self, feed: Int[Tensor, "batch new"], cache: CausalCache) -> Float[Tensor, "batch vocab"]:
        return self.logits(self._fill(feed, cache)[:, -1])

    def check_length(self, prompt: int, new: int) -> None:
        """Raise `PromptError` for an empty prompt, or where prompt and new tokens exceed the context."""
        context = int(self.causal_lm.config.max_position_embeddings)
        if prompt == 0:
            raise PromptError("the prompt is empty", "give at least one token (the tokenizer's BOS begins a text)")
        if prompt + new > context:
            raise PromptError(
                f"a prompt of {prompt} tokens and {new} new ones exceed the context of {context}",
                f"shorten the prompt to {max(context - new, 0)} tokens or ask for fewer new ones",
            )


def default_stops(tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """The ids that end a text; none where there is no tokenizer or it knows no end."""
    if tokenizer is None or tokenizer.eos_token_id is None:
        return []
    return [int(tokenizer.eos_token_id)]


def draw(generators: Sequence[torch.Generator]) -> Float[Tensor, " rows"]:
    """One number from [0, 1) of each generator, all of the CPU, so that a seed gives the same text on every device."""
    return torch.cat([torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators])


@torch.no_grad()
def sample_documents(
    parent: Parent,
    n: int,
    max_tokens: int,
    seed: int = 0,
    temperature: float = 1.0,
    top_p: float | None = None,
    batch_size: int = 64,
) -> Iterator[list[int]]:
    """`n` documents drawn from the parent, each without BOS and EOS, at most `max_tokens` long.

    At temperature 1 without top_p these are exact samples: the parent's likelihood is the data's entropy (a document
    cut at `max_tokens` ends there). Batch b depends on (seed, b, batch_size) alone.
    """
    ends = default_stops(parent.tokenizer)
    start_id = parent.tokenizer.bos_token_id if parent.tokenizer is not None else None
    if start_id is None and ends:
        start_id = ends[0]
    if start_id is None:
        raise PromptError("the tokenizer has neither BOS nor EOS", "documents cannot be sampled without a first token")
    parent.check_length(1, max_tokens)
    for number, begin in enumerate(range(0, n, batch_size)):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
        yield from _sample_batch(
            parent, min(batch_size, n - begin), max_tokens, int(start_id), temperature, top_p, generator
        )


def _sample_batch(
    parent: Parent,
    rows: int,
    max_tokens: int,
    start_id: int,
    temperature: float,
    top_p: float | None,
    generator: torch.Generator,
) -> list[list[int]]:
    stops = torch.tensor(default_stops(parent.tokenizer), dtype=torch.long)
    documents: list[list[int]] = [[] for _ in range(rows)]
    owner = torch.arange(rows)
    active = torch.ones(rows, dtype=torch.bool)
    cache = CausalCache(rows, max_tokens + 1)
    feed = torch.full((rows, 1), start_id, device=parent.device)
    for _ in range(max_tokens):
        uniform = torch.rand(len(feed), dtype=torch.float64, generator=generator)
        uniform = uniform.to(feed.device, non_blocking=True)
        choice = next_tokens(parent._step(feed, cache), uniform, temperature, top_p)
        drawn = choice.cpu()  # the one wait of a token
        read_tokens(drawn)
        active &= ~torch.isin(drawn, stops)
        for row, token in zip(owner[active].tolist(), drawn[active].tolist(), strict=True):
            documents[row].append(token)
        if not active.any():
            break
        feed = choice[:, None]
        # Finished rows ride along until they are many: dropping them copies the cache.
        if 4 * int(active.sum()) <= 3 * len(owner):
            kept = active.nonzero()[:, 0].to(feed.device, non_blocking=True)
            cache.keep_rows(kept)
            owner, feed, active = owner[active], feed[kept], active[active]
    return documents
