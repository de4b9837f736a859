"""Prompt in, text and timings out: batches of prompts through a decoder, with events while it runs.

A prompt's whole blocks are prefilled; its tail shares the first active block and is never written. A row ends
when a finished block holds the end of text or a stop string, or at its length; tokens beyond are cut.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from hildanext.ar import Parent, PromptError
from hildanext.config import knobs
from hildanext.decode.base import Decoder
from hildanext.decode.session import BlockSession, Commit, Row, Step
from hildanext.models.bidirectional import DiffusionModel
from hildanext.tokenization import encode_prompt as encode_prompt

DEFAULT_NEW_TOKENS = 256
FinishReason = Literal["eos", "stop", "length"]


@knobs
class GenerationKnobs:
    """What does not depend on the decoder."""

    max_new_tokens: int | None = Field(default=None, ge=1)
    """None: 256, or what the context leaves."""
    seed: int = 0
    """Row i of the prompts draws from seed + i, whatever batch it runs in."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    ignore_eos: bool = False
    batch_size: int = Field(default=8, ge=1)
    commit: Commit = "auto"
    cached: bool = True
    """False runs every forward from position 0 on: the reference for tests."""
    trace: bool = False
    debug: bool = False
    """Check before every forward that the cache belongs to the tokens."""


@dataclass(frozen=True)
class DecodeStats:
    """Counts of one row: the forwards it took part in, the tokens it kept."""

    prefill_forwards: int
    denoise_forwards: int
    commit_forwards: int
    """Forwards that did nothing but commit a block; a fused commit costs none."""
    revise_forwards: int
    tokens: int
    edits: int
    seconds: float
    prefill_seconds: float

    @property
    def forwards(self) -> int:
        """All of them."""
        return self.prefill_forwards + self.denoise_forwards + self.commit_forwards + self.revise_forwards

    @property
    def tokens_per_forward(self) -> float:
        """Kept tokens over all forwards but the prefill."""
        return self.tokens / max(self.forwards - self.prefill_forwards, 1)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt. `tokens` hold the end-of-text token that ended it, `text` does not."""

    tokens: list[int]
    text: str
    finish_reason: FinishReason
    stats: DecodeStats
    trace: list[Step] = field(default_factory=list)


@dataclass(frozen=True)
class Event:
    """Something that happened to one row. `text`: a piece of final text; `step`: a forward; `end`: the row is done."""

    row: int
    kind: Literal["text", "step", "end"]
    text: str = ""
    step: Step | None = None


OnEvent = Callable[[Event], None]
OnCompletion = Callable[[int, Completion], None]
"""Called with the prompt's number as soon as its row has ended, in whatever order rows end."""


def generate(
    model: DiffusionModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Sequence[int]],
    decoder: Decoder,
    settings: GenerationKnobs | None = None,
    on_event: OnEvent | None = None,
    on_completion: OnCompletion | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Completion]:
    """Complete every prompt (token ids; an empty one starts from BOS). Without a tokenizer there is no text and no EOS.

    `seeds`, one per prompt, replace `settings.seed` + i.
    Raises `PromptError` for a prompt that does not fit the context or holds ids that are no tokens.
    """
    settings = settings if settings is not None else GenerationKnobs()
    prompts = [_checked(model, tokenizer, prompt) for prompt in prompts]
    limits = [_limit(model, len(prompt), settings.max_new_tokens) for prompt in prompts]
    seeds = seeds if seeds is not None else range(settings.seed, settings.seed + len(prompts))
    completions: list[Completion] = []
    for first in range(0, len(prompts), settings.batch_size):
        batch = range(first, min(first + settings.batch_size, len(prompts)))
        drawn = [seeds[i] for i in batch]
        run = _Run(model, tokenizer, decoder, settings, on_event, batch, drawn, on_completion)
        completions += run.complete([prompts[i] for i in batch], [limits[i] for i in batch])
    return completions


def context_length(model: DiffusionModel) -> int:
    """Positions the model can address, in whole blocks."""
    return model.causal_lm.config.max_position_embeddings // model.card.block_size * model.card.block_size


class _Run:
    """One batch: turns a session's finished blocks into text, events and completions."""

    def __init__(
        self,
        model: DiffusionModel,
        tokenizer: PreTrainedTokenizerBase | None,
        decoder: Decoder,
        settings: GenerationKnobs,
        on_event: OnEvent | None,
        batch: range,
        seeds: Sequence[int],
        on_completion: OnCompletion | None,
    ) -> None:
        self.model, self.tokenizer, self.decoder, self.settings = model, tokenizer, decoder, settings
        self.on_event, self.batch, self.seeds, self.on_completion = on_event, batch, seeds, on_completion
        self.eos = frozenset() if settings.ignore_eos else eos_ids(model, tokenizer)
        self.steps: dict[int, list[Step]] = {i: [] for i in range(len(batch))}
        self.shown = dict.fromkeys(range(len(batch)), "")
        self.done: dict[int, Completion] = {}
        self.began = self.prefilled = 0.0

    @torch.inference_mode()
    def complete(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[Completion]:
        watching = self.settings.trace or self.on_event is not None
        self.began = time.perf_counter()
        session = BlockSession(
            self.model,
            prompts,
            limits,
            self._ended,
            seeds=self.seeds,
            commit=self.settings.commit,
            cached=self.settings.cached,
            observe=self._observe if watching else None,
            debug=self.settings.debug,
        )
        session.prefill()
        self.prefilled = time.perf_counter() - self.began
        self.decoder.decode(session)
        return [self.done[i] for i in range(len(prompts))]

    def _observe(self, step: Step) -> None:
        if self.settings.trace:
            self.steps[step.row].append(step)
        self._tell(Event(self.batch[step.row], "step", step=step))

    def _tell(self, event: Event) -> None:
        if self.on_event is not None:
            self.on_event(event)

    def _ended(self, row: Row, tokens: list[int]) -> bool:
        tokens = tokens[row.prompt : row.limit]
        reason = self._reason(row, tokens)
        if reason is None:
            lag = self.decoder.window * self.model.card.block_size
            self._show(row, self._text(tokens[: max(row.start - row.prompt - lag, 0)]), final=False)
            return False
        kept, text, why = reason
        self._show(row, text, final=True)
        stats = DecodeStats(
            prefill_forwards=row.prefill,
            denoise_forwards=row.denoise,
            commit_forwards=row.commit,
            revise_forwards=row.revise,
            tokens=len(kept),
            edits=row.edits,
            seconds=time.perf_counter() - self.began,
            prefill_seconds=self.prefilled,
        )
        self.done[row.index] = Completion(kept, text, why, stats, self.steps[row.index])
        self._tell(Event(self.batch[row.index], "end"))
        if self.on_completion is not None:
            self.on_completion(self.batch[row.index], self.done[row.index])
        return True

    def _reason(self, row: Row, tokens: list[int]) -> tuple[list[int], str, FinishReason] | None:
        """Tokens, text and reason of a row that ends here, or None."""
        end = next((i for i, token in enumerate(tokens) if token in self.eos), None)
        kept = tokens if end is None else tokens[: end + 1]
        text = self._text(kept if end is None else kept[:-1])
        stop = min((at for at in (text.find(word) for word in self.settings.stop) if at >= 0), default=None)
        if stop is not None:
            return self._cut(kept, text, stop), text[:stop], "stop"
        if end is not None:
            return kept, text, "eos"
        return (kept, text, "length") if row.start >= row.limit else None

    def _cut(self, tokens: list[int], text: str, stop: int) -> list[int]:
        """The shortest beginning of `tokens` whose text holds the stop string whole."""
        length = stop + max(len(word) for word in self.settings.stop if text.startswith(word, stop))
        low, high = 0, len(tokens)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if len(self._text(tokens[:middle])) >= length else (middle + 1, high)
        return tokens[:low]

    def _text(self, tokens: list[int]) -> str:
        return "" if self.tokenizer is None else str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _show(self, row: Row, text: str, final: bool) -> None:
        """Send the new part of a row's text, holding back half a character and what may become a stop string."""
        if self.on_event is None:
            return
        if not final:
            text = text.rstrip("\ufffd")
            text = text[: len(text) - max((_overlap(text, word) for word in self.settings.stop), default=0)]
        before = self.shown[row.index]
        if text.startswith(before) and len(text) > len(before):
            self.shown[row.index] = text
            self._tell(Event(self.batch[row.index], "text", text=text[len(before) :]))


def eos_ids(model: DiffusionModel | Parent, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """Ids that end a text: the tokenizer's, and those of the model's own generation settings."""
    found: set[int] = set()
    if tokenizer is not None:
        listed = getattr(model.causal_lm.generation_config, "eos_token_id", None)
        found.update([listed] if isinstance(listed, int) else listed or [])
        if tokenizer.eos_token_id is not None:
            found.add(tokenizer.eos_token_id)
    return frozenset(found)


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `word`."""
    return next((n for n in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:n])), 0)


def _checked(model: DiffusionModel, tokenizer: Any, prompt: Iterable[int]) -> list[int]:
    """The prompt, or BOS (else EOS, which separates documents) in place of an empty one."""
    ids = list(prompt)
    if not ids:
        first = getattr(tokenizer, "bos_token_id", None)
        first = first if first is not None else getattr(tokenizer, "eos_token_id", None)
        if first is None:
            raise PromptError("the prompt is empty and the tokenizer has no BOS token", "give at least one token")
        ids = [first]
    card = model.card
    wrong = [token for token in ids if not 0 <= token < card.vocab_rows or token == card.mask_id]
    if wrong:
        raise PromptError(f"the prompt holds id {wrong[0]}, which is no token", "encode it with this model's tokenizer")
    return ids


def _limit(model: DiffusionModel, prompt: int, new: int | None) -> int:
    """Tokens of the finished document. Raises `PromptError` where they do not fit the context."""
    context = context_length(model)
    room = context - prompt
    if room < 1:
        raise PromptError(
            f"the prompt has {prompt} tokens, the model's context is {context}", f"shorten it to {context - 1} or fewer"
        )
    if new is not None and new > room:
        raise PromptError(
            f"prompt ({prompt} tokens) and {new} new tokens exceed the context of {context}",
            f"ask for at most {room} new tokens",
        )
    return prompt + (new if new is not None else min(DEFAULT_NEW_TOKENS, room))
