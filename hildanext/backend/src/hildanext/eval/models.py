"""Who answers: a diffusion model under a decoder or at a block size, or the parent; all through the same two questions.

`write` takes prompts as token ids and hands over each answer as soon as it is whole; `score` takes pairs. Batches are
the caller's. Answers do not depend on the batch they were written in.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from hildanext.ar import ArResult, Parent
from hildanext.decoding import make_decoder
from hildanext.eval.generation import PARENT, label
from hildanext.inference import Completion, GenerationConfig, context_length, eos_ids, generate
from hildanext.likelihood.conditional import Pair, Scored, score_diffusion, score_parent
from hildanext.models import DiffusionModel
from hildanext.tokenization import encode_prompt


@dataclass(frozen=True)
class Answer:
    """What was written, and what it cost. `tokens` counts the end of text; `text` ends before it and before a stop."""

    text: str
    tokens: int
    finish_reason: str
    forwards: int
    """Those the row took part in, prefill and commits included."""
    prefill_forwards: int
    edits: int
    seconds: float
    """From the beginning of its batch to its own end."""
    wall_seconds: float
    """Time since the answer before it: these add up to the time that all of them took."""
    mask_tokens: int
    """Ids that must never be emitted. Anything but 0 is a defect."""


@dataclass(frozen=True)
class GenerationParams:
    """What does not depend on the prompt."""

    max_new_tokens: int
    stops: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float | None = None


OnAnswer = Callable[[int, Answer], None]
"""Called with the prompt's number and its answer."""


class EvalModel:
    """One row of the results: a model and how it is used."""

    name: str
    settings: dict[str, Any]
    """What a score depends on beside the task; it is printed with it, and a resumed run must have the same."""
    tokenizer: PreTrainedTokenizerBase
    context: int

    def encode(self, text: str) -> list[int]:
        """Ids of a document's beginning: BOS where the tokenizer has one."""
        return encode_prompt(self.tokenizer, text)

    def write(
        self, prompts: Sequence[Sequence[int]], ask: GenerationParams, seeds: Sequence[int], hand: OnAnswer
    ) -> None:
        """Answer every prompt, as one batch."""
        raise NotImplementedError

    def score(self, pairs: Sequence[Pair], batch_size: int) -> list[Scored]:
        """-log p of every pair's continuation."""
        raise NotImplementedError


class _Clock:
    """Divides a batch's time among its answers, and leaves out what the caller does with them."""

    def __init__(self) -> None:
        self.begun = self.last = time.perf_counter()
        self.paused = 0.0

    def lap(self) -> tuple[float, float]:
        """Seconds since the beginning, and since the last lap."""
        now = time.perf_counter()
        since, self.last = now - self.last, now
        return now - self.begun - self.paused, since

    def resume(self) -> None:
        now = time.perf_counter()
        self.paused += now - self.last
        self.last = now


class DiffusionEvalModel(EvalModel):
    """A diffusion model: writes with one decoder, scores at one block size."""

    def __init__(
        self,
        model: DiffusionModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        decoder: Mapping[str, Any] | None = None,
        block_size: int | None = None,
        draws: int = 16,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.context = context_length(model)
        self.decoder = dict(decoder) if decoder is not None else None
        self.block_size = block_size if block_size is not None else model.card.block_size
        self.draws = draws
        self.name = name
        how: dict[str, Any] = {"block_size": model.card.block_size, "shift": model.card.shift}
        if self.decoder is not None:
            how["decoder"] = self.decoder
        else:
            how |= {"scored_at": self.block_size, "draws": draws if self.block_size > 1 else 1}
        self.settings = how

    def write(
        self, prompts: Sequence[Sequence[int]], ask: GenerationParams, seeds: Sequence[int], hand: OnAnswer
    ) -> None:
        if self.decoder is None:
            raise NotImplementedError(f"{self.name} has no decoder")
        section = dict(self.decoder)
        if ask.temperature > 0:
            section |= {"temperature": ask.temperature, "top_p": ask.top_p}
        how = GenerationConfig(max_new_tokens=ask.max_new_tokens, stop=ask.stops, batch_size=max(len(prompts), 1))
        clock = _Clock()

        def told(index: int, done: Completion) -> None:
            seconds, wall = clock.lap()
            stats = done.stats
            banned = sum(bool(self.model.banned[token]) for token in done.tokens)
            answer = Answer(
                text=done.text,
                tokens=stats.tokens,
                finish_reason=done.finish_reason,
                forwards=stats.forwards,
                prefill_forwards=stats.prefill_forwards,
                edits=stats.edits,
                seconds=seconds,
                wall_seconds=wall,
                mask_tokens=banned,
            )
            hand(index, answer)
            clock.resume()

        generate(self.model, self.tokenizer, prompts, make_decoder(section), how, None, told, seeds)

    def score(self, pairs: Sequence[Pair], batch_size: int) -> list[Scored]:
        return score_diffusion(self.model, pairs, self.block_size, self.draws, batch_size)


class ParentEvalModel(EvalModel):
    """The autoregressive parent, with its own key-value cache."""

    name = PARENT

    def __init__(self, parent: Parent, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> None:
        self.parent, self.tokenizer, self.stop_ids = parent, tokenizer, sorted(stop_ids)
        self.context = int(parent.causal_lm.config.max_position_embeddings)
        self.settings = {"decoder": {"name": "autoregressive"}}

    def write(
        self, prompts: Sequence[Sequence[int]], ask: GenerationParams, seeds: Sequence[int], hand: OnAnswer
    ) -> None:
        clock = _Clock()
        longest = max((len(stop.encode()) for stop in ask.stops), default=0)

        def over(index: int, tokens: list[int]) -> bool:
            # A token is a byte or more, so a stop string that ends here begins in these.
            text = self._text(tokens[-longest - 4 :]) if longest else ""
            return any(stop in text for stop in ask.stops) and _first(self._text(tokens), ask.stops) is not None

        def told(index: int, done: ArResult) -> None:
            seconds, wall = clock.lap()
            hand(index, self._answer(done, ask.stops, seconds, wall))
            clock.resume()

        self.parent.generate_batch(
            prompts, ask.max_new_tokens, ask.temperature, ask.top_p, None, seeds, self.stop_ids, over, told
        )

    def score(self, pairs: Sequence[Pair], batch_size: int) -> list[Scored]:
        return score_parent(self.parent, pairs, batch_size)

    def _answer(self, done: ArResult, stops: Sequence[str], seconds: float, wall: float) -> Answer:
        ended = done.tokens[-1] in self.stop_ids
        text = self._text(done.tokens[:-1] if ended else done.tokens)
        stop = _first(text, stops)
        banned = self.parent.banned
        return Answer(
            text=text if stop is None else text[:stop],
            tokens=len(done.tokens),
            finish_reason="stop" if stop is not None else "eos" if ended else "length",
            forwards=done.forwards,
            # The prefill yields the first token: counted as a decoding forward, so that this way has 1 token each.
            prefill_forwards=0,
            edits=0,
            seconds=seconds,
            wall_seconds=wall,
            mask_tokens=0 if banned is None else sum(bool(banned[token]) for token in done.tokens),
        )

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


@dataclass(frozen=True)
class ModelPair:
    """The models that are compared; either may be absent."""

    model: DiffusionModel | None
    tokenizer: PreTrainedTokenizerBase
    parent: Parent | None

    def parent_way(self) -> list[EvalModel]:
        if self.parent is None:
            return []
        return [ParentEvalModel(self.parent, self.tokenizer, sorted(eos_ids(self.parent, self.tokenizer)))]

    def writing(self, decoders: Mapping[str, Mapping[str, Any]]) -> list[EvalModel]:
        """The parent, then the diffusion model under each decoder."""
        found = self.parent_way()
        if self.model is not None:
            found += [
                DiffusionEvalModel(self.model, self.tokenizer, label(name), how) for name, how in decoders.items()
            ]
        return found

    def scoring(self, block_sizes: Sequence[int | None], draws: int) -> list[EvalModel]:
        """The parent, then the diffusion model at each block size."""
        found = self.parent_way()
        if self.model is not None:
            own = self.model.card.block_size
            for size in dict.fromkeys(size if size is not None else own for size in block_sizes):
                name = f"diffusion, block {size}, {'exact' if size == 1 else 'bound'}"
                found.append(DiffusionEvalModel(self.model, self.tokenizer, name, None, size, draws))
        return found


def _first(text: str, stops: Sequence[str]) -> int | None:
    return min((at for at in (text.find(stop) for stop in stops) if at >= 0), default=None)
