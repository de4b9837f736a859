"""Samples of a converted model in each mode, beside its parent's greedy text; written as `samples.json`.

With `prompts_file` every prompt of a file is answered instead, line by line into `answers.jsonl`.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import Field

from hildanext.core.config import Seed, config, validate
from hildanext.core.errors import ConfigError, ModelError
from hildanext.core.metrics_log import to_json
from hildanext.core.run_dir import write_atomically
from hildanext.data.prompts import read_prompts
from hildanext.detokenization import TokenCells, cell_bytes, pieces_of
from hildanext.recipe import StageContext
from hildanext.stages.answer_file import answer_file

if TYPE_CHECKING:
    from hildanext.ar import Parent
    from hildanext.core.runtime import RuntimeConfig
    from hildanext.decoding import Decoder
    from hildanext.exact import LoadedDrafter
    from hildanext.inference import GenerationConfig
    from hildanext.models.loading.loaded_model import LoadedModel

logger = logging.getLogger(__name__)

READS = ("decoder", "generation")
COUNTS = ("tokens", "forwards", "tokens_per_forward", "rows_per_token", "tokens_per_second", "edits")
"""Of every sample."""
NEW_TOKENS = 96
"""Of a sample, where nothing else is said."""


@config
class SampleConfig:
    """What is asked, and how it is answered."""

    prompts: tuple[str, ...] | None = None
    """None: one well-known beginning, unless there is a file."""
    prompts_file: str | None = None
    """One prompt per line, or JSON lines (`.jsonl`): strings, or objects with `prompt` or `messages`."""
    modes: tuple[str, ...] | None = Field(default=None, min_length=1)
    """None: S_MODE and Q_MODE; of a file, and of the verb, S_MODE alone."""
    effort: str | None = None
    decoder: dict[str, Any] = Field(default_factory=dict)
    """Knobs laid over each mode; over the run's section `decoder`."""
    generation: dict[str, Any] = Field(default_factory=dict)
    """Of `GenerationConfig`: what the fields below do not say."""
    chat: bool = False
    """Prompts are questions, put into the model's chat template."""
    special_tokens_in_text: bool = False
    """In a conversation, parse control tokens that a message spells. Usually they are text."""
    stop: tuple[str, ...] | None = None
    batch_size: int | None = Field(default=None, ge=1)
    """Of a file, and of the verb: prompts that are decoded together (8)."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """None: 96; of the verb 256, or what the context leaves."""
    seed: Seed | None = None
    """None is the run's."""
    model: str | None = None
    """A diffusion checkpoint; None is the one an earlier stage made."""
    dtype: str | None = None
    """None is the run's."""
    drafts: str | None = None
    """Draft adapters (a folder, or `tiny`) that exact mode asks in place of `model`."""
    parent: str | None = None
    """The autoregressive model that continues the same `prompts`, greedily; "" is none. None is the run's, of a
    named model its card's; where that cannot be had it is left out, and log and samples say so."""

    def __post_init__(self) -> None:
        if self.prompts is not None and self.prompts_file is not None:
            raise ConfigError("prompts and prompts_file are both given", "choose one")
        if self.parent and self.prompts_file is not None:
            raise ConfigError("the parent answers no file of prompts", "give prompts, or leave parent out")


def check(section: Mapping[str, Any], context: StageContext) -> None:
    """Raises `ConfigError` for an unknown key, `UnknownChoice` for a mode that does not exist, `DataError` for a
    file of prompts that cannot be read."""
    settings = validate(SampleConfig, section, where=context.key)
    if settings.chat and settings.prompts_file is None and not context.alone:
        raise ConfigError("chat is about a file of prompts", "give prompts_file")
    _check_sections(settings, context)
    generation_config(settings, context)
    if settings.prompts_file is not None:
        read_prompts(settings.prompts_file)


def stage(section: Mapping[str, Any], context: StageContext) -> dict[str, Any]:
    """Every prompt in every mode; each sample with its text, its forwards and its speed."""
    from hildanext.runtimes.onnx_open import open_diffusion

    settings = validate(SampleConfig, section, where=context.key)
    name = settings.model if settings.model is not None else str(context.outcome("model"))
    if settings.prompts_file is None:
        return _samples(settings, context, name)
    opened = open_diffusion(name, runtime_of(settings, context))
    together, decoders = generation_config(settings, context), _decoders(settings, context)
    prompts, model, tokenizer = settings.prompts_file, opened.model, opened.tokenizer
    asked = (settings.chat, settings.special_tokens_in_text)
    path = answer_file(prompts, context.stage_dir, model, tokenizer, decoders, together, *asked)
    return {"answers": str(path)}


def runtime_of(settings: SampleConfig, context: StageContext) -> "RuntimeConfig":
    """What models of this stage are opened with."""
    runtime = context.runtime_config
    return runtime if settings.dtype is None else replace(runtime, dtype=settings.dtype)


def decoder_sections(settings: SampleConfig, context: StageContext) -> dict[str, dict[str, Any]]:
    """The section of a decoder for each mode, by the mode's name; of another decoder by its own."""
    from hildanext.decoding import MODES, decoder_section, mode_name

    fast = _fast_section(settings, context)
    one = context.alone or settings.prompts_file is not None
    modes = settings.modes if settings.modes is not None else ("S_MODE",) if one else ("S_MODE", "Q_MODE")
    name = settings.decoder.get("name", MODES["S_MODE"]["name"])
    if settings.modes is None and name != MODES["S_MODE"]["name"]:
        return {str(name): decoder_section(None, settings.effort, settings.decoder)}
    return {mode_name(mode): decoder_section(mode, settings.effort, settings.decoder, fast) for mode in modes}


def _fast_section(settings: SampleConfig, context: StageContext) -> dict[str, Any] | None:
    """What the card of the model says of mode `fast`, where that is asked for; S_MODE stands for it as long as no
    earlier stage has made the model."""
    from hildanext.decoding import FAST, MODES, mode_name
    from hildanext.facade import fast_of

    if FAST not in map(mode_name, settings.modes if settings.modes is not None else ()):
        return None
    if settings.model is not None:
        return fast_of(settings.model)
    if context.alone:
        return fast_of("tiny")
    made = [outcome["model"] for outcome in context.outcomes.values() if "model" in outcome]
    return fast_of(str(made[-1])) if made else dict(MODES["S_MODE"])


def generation_config(settings: SampleConfig, context: StageContext, **fixed: Any) -> "GenerationConfig":
    """What does not depend on the decoder; `fixed` is laid over it. Raises `ConfigError`."""
    from hildanext.inference import GenerationConfig

    usual = {"seed": context.seed, **({} if context.alone else {"max_new_tokens": NEW_TOKENS})}
    own = {name: getattr(settings, name) for name in ("max_new_tokens", "seed", "stop", "batch_size")}
    named = {name: value for name, value in own.items() if value is not None}
    return validate(GenerationConfig, {**usual, **settings.generation, **named, **fixed}, "section generation")


def _check_sections(settings: SampleConfig, context: StageContext) -> None:
    """Answers to a file of prompts are decoded by diffusion alone; else exact mode may be asked for, too."""
    from hildanext.decoding import make_decoder, make_method

    of_file = settings.prompts_file is not None and not context.alone
    for section in decoder_sections(settings, context).values():
        (make_decoder if of_file else make_method)(section)


def _decoders(settings: SampleConfig, context: StageContext) -> "dict[str, Decoder]":
    from hildanext.decoding import make_decoder

    return {name: make_decoder(section) for name, section in decoder_sections(settings, context).items()}


def _samples(settings: SampleConfig, context: StageContext, name: str) -> dict[str, Any]:
    from hildanext.eval.models import EvalAnswer, GenerationParams, ModelPair
    from hildanext.facade import open_for

    generation = generation_config(settings, context, batch_size=1, trace=True)
    opened: dict[bool, Any] = {}
    samples: list[dict[str, Any]] = []
    for mode, section in decoder_sections(settings, context).items():
        exact = section["name"] == "exact"  # `tiny` names a model of either kind
        model = settings.drafts if exact and settings.drafts is not None else name
        if exact not in opened:
            opened[exact] = open_for(section, model, runtime_of(settings, context), settings.parent or None)
        samples += _written(settings, opened[exact], mode, section, generation)
    first = next(iter(opened.values()))
    parent, missing = _parent(settings, context, first)
    params = GenerationParams(generation.max_new_tokens or NEW_TOKENS, generation.stop)
    for writer in ModelPair(None, first.tokenizer, parent).parent_models():
        for prompt, ids, shown in _encoded(settings, first.tokenizer):
            answers: dict[int, EvalAnswer] = {}
            # One at a time, as the model's own are, so that their seconds can be set beside each other.
            writer.write([ids], params, [0], answers.__setitem__)
            counts = answers[0].flat_record(*COUNTS)
            samples.append({"way": writer.name, "prompt": prompt, **counts, "prompt_cells": shown})
    path = context.stage_dir / "samples.json"
    record = {"machine": first.machine(), "without_parent": missing, "samples": samples}
    write_atomically(path, to_json(record, indent=2) + "\n")
    return {"samples": str(path)}


def _written(
    settings: SampleConfig,
    opened: "LoadedModel | LoadedDrafter",
    mode: str,
    section: Mapping[str, Any],
    generation: "GenerationConfig",
) -> list[dict[str, Any]]:
    """A sample of each prompt in one mode."""
    from hildanext.decoding.trace import trace_record
    from hildanext.facade import writer_of

    asked = _encoded(settings, opened.tokenizer)
    results = writer_of(opened, section)([ids for _, ids, _ in asked], generation, None)
    samples = []
    for (prompt, ids, shown), result in zip(asked, results, strict=True):
        trace = trace_record(result.trace, TokenCells(opened.tokenizer, ids))
        head = {"way": mode, "prompt": prompt, **result.flat_record(*COUNTS)}
        samples.append({**head, "prompt_cells": shown, "trace": trace})
    return samples


def _encoded(settings: SampleConfig, tokenizer: Any) -> list[tuple[str, list[int], list[str]]]:
    """Each prompt's text, its tokens and their texts."""
    from hildanext.tokenization import encode_prompt

    texts = settings.prompts if settings.prompts is not None else ("Once upon a time",)
    encoded = [(text, encode_prompt(tokenizer, text)) for text in texts]
    return [
        (text, ids, pieces_of(cell_bytes(cell) for cell in TokenCells(tokenizer, ids).prompt()))
        for text, ids in encoded
    ]


def _parent(
    settings: SampleConfig, context: StageContext, opened: "LoadedModel | LoadedDrafter"
) -> "tuple[Parent | None, str | None]":
    """The parent that writes beside the model, or why there is none. Raises `ModelError` for a named one."""
    from hildanext.ar import Parent
    from hildanext.models.loading.loaded_model import LoadedModel

    if not isinstance(opened, LoadedModel):
        return (None, "none was asked for") if settings.parent == "" else (opened.parent, None)
    usual = context.start if settings.model is None else opened.parent_name
    name = settings.parent if settings.parent is not None else usual
    if not name:
        return None, "none was asked for" if settings.parent is not None else "the checkpoint names none"
    try:
        return Parent(*opened.parent(name)), None
    except ModelError as problem:
        if settings.parent is not None:
            raise
        logger.warning("the parent %r writes nothing beside the samples: %s", name, problem)
        return None, f"{name!r} could not be had: {problem}"
