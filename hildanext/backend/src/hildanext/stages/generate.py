"""Samples of a converted model in each mode, beside its parent's greedy text; written as `samples.json`.

With `prompts_file` every prompt of a file is answered instead, line by line into `answers.jsonl`.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from hildanext.core.config import config, validate
from hildanext.core.errors import ConfigError
from hildanext.recipe import StageContext

if TYPE_CHECKING:
    from hildanext.decoding import Decoder
    from hildanext.inference import GenerationConfig
    from hildanext.models.loading.loaded_model import LoadedModel


COUNTS = ("tokens", "forwards", "tokens_per_forward", "tokens_per_second", "edits")
"""Of every sample."""


@config
class SampleConfig:
    """What is asked, and how it is answered."""

    prompts: tuple[str, ...] | None = None
    """None: one well-known beginning, unless there is a file."""
    prompts_file: str | None = None
    """One prompt per line, or JSON lines (`.jsonl`): strings, or objects with `prompt` or `messages`."""
    modes: tuple[str, ...] | None = Field(default=None, min_length=1)
    """None: S_MODE and Q_MODE, of a file S_MODE alone."""
    effort: str | None = None
    decoder: dict[str, Any] = Field(default_factory=dict)
    """Knobs laid over each mode."""
    chat: bool = False
    """Of a file: prompts are questions, put into the model's chat template."""
    special_tokens_in_text: bool = False
    """In a conversation, parse control tokens that a message spells. Usually they are text."""
    stop: tuple[str, ...] = ()
    batch_size: int = Field(default=8, ge=1)
    """Of a file: prompts that are decoded together."""
    max_new_tokens: int = Field(default=96, ge=1)
    seed: int = Field(default=0, ge=0)
    model: str | None = None
    """A diffusion checkpoint; None is the one an earlier stage made."""

    def __post_init__(self) -> None:
        if self.prompts is not None and self.prompts_file is not None:
            raise ConfigError("prompts and prompts_file are both given", "choose one")
        if self.chat and self.prompts_file is None:
            raise ConfigError("chat is about a file of prompts", "give prompts_file")


def check(section: Mapping[str, Any], context: StageContext) -> None:
    """Raises `ConfigError` for an unknown key, `UnknownChoice` for a mode that does not exist, `DataError` for a
    file of prompts that cannot be read."""
    from hildanext.data.prompts import read_prompts

    settings = validate(SampleConfig, section, where=context.key)
    _decoders(settings)
    if settings.prompts_file is not None:
        read_prompts(settings.prompts_file)


def stage(section: Mapping[str, Any], context: StageContext) -> dict[str, Any]:
    """Every prompt in every mode; each sample with its text, its forwards and its speed."""
    from hildanext.inference import GenerationConfig
    from hildanext.models.loading.loaded_model import LoadedModel
    from hildanext.stages.answer_file import answer_file

    settings = validate(SampleConfig, section, where=context.key)
    name = settings.model if settings.model is not None else str(context.outcome("model"))
    opened = LoadedModel.open(name, context.runtime)
    how: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "seed": settings.seed, "stop": settings.stop}
    if settings.prompts_file is None:
        return _samples(settings, context, opened, GenerationConfig(**how, batch_size=1, trace=True))
    together = GenerationConfig(**how, batch_size=settings.batch_size)
    decoders = _decoders(settings)
    prompts, model, tokenizer = settings.prompts_file, opened.model, opened.tokenizer
    asked = (settings.chat, settings.special_tokens_in_text)
    path = answer_file(prompts, context.stage_dir, model, tokenizer, decoders, together, *asked)
    return {"answers": str(path)}


def _decoders(settings: SampleConfig) -> "dict[str, Decoder]":
    """A decoder for each mode, by the mode's name."""
    from hildanext.decoding import MODES, decoder_section, make_decoder, mode_name

    usual = ("S_MODE", "Q_MODE") if settings.prompts_file is None else ("S_MODE",)
    modes = settings.modes if settings.modes is not None else usual
    name = settings.decoder.get("name", MODES["S_MODE"]["name"])
    if settings.modes is None and name != MODES["S_MODE"]["name"]:
        return {name: make_decoder(decoder_section(None, settings.effort, settings.decoder))}
    return {mode_name(mode): make_decoder(decoder_section(mode, settings.effort, settings.decoder)) for mode in modes}


def _samples(
    settings: SampleConfig, context: StageContext, opened: "LoadedModel", generation: "GenerationConfig"
) -> dict[str, Any]:
    from hildanext.core.run_dir import write_atomically
    from hildanext.decoding.trace import trace_record
    from hildanext.detokenization import TokenCells, cell_bytes, pieces_of
    from hildanext.inference import generate
    from hildanext.tokenization import encode_prompt

    texts = settings.prompts if settings.prompts is not None else ("Once upon a time",)
    model, tokenizer = opened.model, opened.tokenizer
    prompts = [encode_prompt(tokenizer, text) for text in texts]
    samples: list[dict[str, Any]] = []
    for mode, decoder in _decoders(settings).items():
        results = generate(model, tokenizer, prompts, decoder, generation)
        for prompt, ids, result in zip(texts, prompts, results, strict=True):
            texts_of = TokenCells(tokenizer, ids)
            cells = pieces_of(cell_bytes(cell) for cell in texts_of.prompt())
            trace = trace_record(result.trace, texts_of)
            head = {"way": mode, "prompt": prompt, **result.flat_record(*COUNTS)}
            samples.append({**head, "prompt_cells": cells, "trace": trace})
    path = context.stage_dir / "samples.json"
    record = {"machine": opened.machine(), "samples": samples}
    write_atomically(path, json.dumps(record, indent=2) + "\n")
    return {"samples": str(path)}
