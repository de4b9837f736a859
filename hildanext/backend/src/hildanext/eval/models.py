"""Models under evaluation: a diffusion model under a decoder or at a block size, or the parent; two methods each.

`write` takes prompts as token ids and hands over each answer as soon as it is whole; `score` takes pairs. Batches are
the caller's. Answers do not depend on the batch they were written in.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hildanext.ar import Parent
from hildanext.data.generation_result import GenerationResult
from hildanext.decoding import make_decoder
from hildanext.decoding.detokenizer import IncrementalDetokenizer
from hildanext.eval.generation import PARENT, label
from hildanext.inference import GenerationConfig, context_length, eos_ids, generate
from hildanext.likelihood.conditional import Pair, Scored, score_diffusion, score_parent
from hildanext.models import DiffusionModel
from hildanext.tokenization import encode_prompt


@dataclass(frozen=True, kw_only=True)
class EvalAnswer(GenerationResult):
    """What was written, with its cost inside its batch. `text` ends before the end of text and before a stop."""

    seconds: float
    """From the beginning of its batch to its own end, without what the caller did with earlier answers."""
    wall_seconds: float
    """Time since the answer before it: these add up to the time that all of them took."""
    mask_tokens: int
    """Ids that must never be emitted. Anything but 0 is a defect."""

    def sample_record(self) -> dict[str, Any]:
        """What a sample of a task keeps of it."""
        own = {name: getattr(self, name) for name in ("seconds", "wall_seconds", "mask_tokens")}
        return {**self.flat_record("tokens", "forwards", "prefill_forwards", "edits"), **own}


@dataclass(frozen=True)
class GenerationParams:
    """What does not depend on the prompt."""

    max_new_tokens: int
    stops: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float | None = None


OnAnswer = Callable[[int, EvalAnswer], None]
"""Called with the prompt's number and its answer."""


class EvalModel:
    """One row of the results: a model and how it is used."""

    name: str
    settings: dict[str, Any]
    """What a score depends on beside the task; it is printed with it, and a resumed run must have the same."""
    tokenizer: PreTrainedTokenizerBase
    context: int

    @property
    def network(self) -> PreTrainedModel:
        """Its weights."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """Ids of a document's beginning: BOS where the tokenizer has one."""
        return encode_prompt(self.tokenizer, text)

    def write(
        self, prompts: Sequence[Sequence[int]], params: GenerationParams, seeds: Sequence[int], on_answer: OnAnswer
    ) -> None:
        """Answer every prompt, as one batch; `on_answer` hears each as soon as it is whole."""
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
        cache: Mapping[str, Any] | str | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.cache = dict(cache) if isinstance(cache, Mapping) else cache
        self.context = context_length(model)
        self.decoder = dict(decoder) if decoder is not None else None
        self.block_size = block_size if block_size is not None else model.card.block_size
        self.draws = draws
        self.name = name
        settings: dict[str, Any] = {"block_size": model.card.block_size, "shift": model.card.shift}
        if self.decoder is not None:
            settings["decoder"] = self.decoder
            settings |= {"cache": self.cache} if self.cache is not None else {}
        else:
            settings |= {"scored_at": self.block_size, "draws": draws if self.block_size > 1 else 1}
        self.settings = settings

    @property
    def network(self) -> PreTrainedModel:
        return self.model.causal_lm

    def write(
        self, prompts: Sequence[Sequence[int]], params: GenerationParams, seeds: Sequence[int], on_answer: OnAnswer
    ) -> None:
        if self.decoder is None:
            raise NotImplementedError(f"{self.name} has no decoder")
        section = dict(self.decoder)
        if params.temperature > 0:
            section |= {"temperature": params.temperature, "top_p": params.top_p}
        settings = GenerationConfig(
            max_new_tokens=params.max_new_tokens,
            stop=params.stops,
            batch_size=max(len(prompts), 1),
            cache=self.cache,
        )
        clock = _Clock()

        def on_completion(index: int, result: GenerationResult) -> None:
            on_answer(index, _answer(result, self.model.banned, *clock.lap()))
            clock.resume()

        decoder = make_decoder(section)
        generate(self.model, self.tokenizer, prompts, decoder, settings, None, on_completion, seeds)

    def score(self, pairs: Sequence[Pair], batch_size: int) -> list[Scored]:
        return score_diffusion(self.model, pairs, self.block_size, self.draws, batch_size)


class ParentEvalModel(EvalModel):
    """The autoregressive parent, with its own key-value cache."""

    name = PARENT

    def __init__(self, parent: Parent, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> None:
        self.parent, self.tokenizer, self.stop_ids = parent, tokenizer, sorted(stop_ids)
        self.context = int(parent.causal_lm.config.max_position_embeddings)
        self.settings = {"decoder": {"name": "autoregressive"}}

    @property
    def network(self) -> PreTrainedModel:
        return self.parent.causal_lm

    def write(
        self, prompts: Sequence[Sequence[int]], params: GenerationParams, seeds: Sequence[int], on_answer: OnAnswer
    ) -> None:
        clock, eos = _Clock(), frozenset(self.stop_ids)
        rows = [IncrementalDetokenizer(self.tokenizer, prompt, eos, params.stops) for prompt in prompts]

        def over(index: int, tokens: list[int]) -> bool:
            return bool(params.stops) and rows[index].add(tokens, full=False) is not None

        def on_result(index: int, result: GenerationResult) -> None:
            times = clock.lap()
            # A stop string counts even where the end of text came with it.
            ending = rows[index].add(result.tokens, full=True)
            assert ending is not None
            whole = replace(result, text=ending.text, finish_reason=ending.reason)
            on_answer(index, _answer(whole, self.parent.banned, *times))
            clock.resume()

        self.parent.generate_batch(
            prompts,
            params.max_new_tokens,
            params.temperature,
            params.top_p,
            None,
            seeds,
            self.stop_ids,
            over,
            on_result,
        )

    def score(self, pairs: Sequence[Pair], batch_size: int) -> list[Scored]:
        return score_parent(self.parent, pairs, batch_size)


@dataclass(frozen=True)
class ModelPair:
    """The models that are compared; either may be absent."""

    model: DiffusionModel | None
    tokenizer: PreTrainedTokenizerBase
    parent: Parent | None

    def parent_models(self) -> list[EvalModel]:
        """The parent where there is one."""
        if self.parent is None:
            return []
        return [ParentEvalModel(self.parent, self.tokenizer, sorted(eos_ids(self.parent, self.tokenizer)))]

    def writing(
        self, decoders: Mapping[str, Mapping[str, Any]], cache: Mapping[str, Any] | str | None = None
    ) -> list[EvalModel]:
        """The parent, then the diffusion model under each decoder, with what its cache keeps."""
        models = self.parent_models()
        if self.model is not None:
            models += [
                DiffusionEvalModel(self.model, self.tokenizer, label(name), section, cache=cache)
                for name, section in decoders.items()
            ]
        return models

    def scoring(self, block_sizes: Sequence[int | None], draws: int) -> list[EvalModel]:
        """The parent, then the diffusion model at each block size."""
        models = self.parent_models()
        if self.model is not None:
            own = self.model.card.block_size
            for size in dict.fromkeys(size if size is not None else own for size in block_sizes):
                name = f"diffusion, block {size}, {'exact' if size == 1 else 'bound'}"
                models.append(DiffusionEvalModel(self.model, self.tokenizer, name, None, size, draws))
        return models


def _answer(result: GenerationResult, banned: Tensor | None, seconds: float, wall_seconds: float) -> EvalAnswer:
    emitted = 0 if banned is None else sum(bool(banned[token]) for token in result.tokens)
    return EvalAnswer(**vars(result), seconds=seconds, wall_seconds=wall_seconds, mask_tokens=emitted)
