"""Samples of a converted model in each mode, beside its parent's greedy text; written as `samples.json`."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from hildanext.config import build, knobs
from hildanext.recipe import StageContext


@knobs
class SampleKnobs:
    """What is asked, and how it is answered."""

    prompts: tuple[str, ...] = ("Once upon a time",)
    modes: tuple[str, ...] = ("S_MODE", "Q_MODE")
    max_new_tokens: int = Field(default=96, ge=1)
    seed: int = Field(default=0, ge=0)
    model: str | None = None
    """A diffusion checkpoint; None is the one an earlier stage made."""


def check(section: Mapping[str, Any], context: StageContext) -> None:
    """Raises `ConfigError` for an unknown key, `UnknownChoice` for a mode that does not exist."""
    from hildanext.decode import decoder_section, make_decoder

    for mode in build(SampleKnobs, section, where=context.key).modes:
        make_decoder(decoder_section(mode))


def stage(section: Mapping[str, Any], context: StageContext) -> dict[str, Any]:
    """Every prompt in every mode; each sample with its text, its forwards and its speed."""
    from hildanext.decode import decoder_section, make_decoder, mode_name
    from hildanext.decode.trace import trace_record
    from hildanext.inference import GenerationKnobs, encode_prompt, generate
    from hildanext.models.load import load_diffusion
    from hildanext.runfolder import write_atomically
    from hildanext.runtime import choose_device, choose_dtype, machine, set_threads

    settings = build(SampleKnobs, section, where=context.key)
    set_threads(context.threads)
    device = choose_device(context.device)
    dtype = choose_dtype(context.dtype, device)
    name = settings.model if settings.model is not None else str(context.outcome("model"))
    model, tokenizer = load_diffusion(name, dtype, device)
    prompts = [encode_prompt(tokenizer, text) for text in settings.prompts]
    how = GenerationKnobs(max_new_tokens=settings.max_new_tokens, seed=settings.seed, batch_size=1, trace=True)
    samples: list[dict[str, Any]] = []
    for mode in settings.modes:
        done = generate(model, tokenizer, prompts, make_decoder(decoder_section(mode)), how)
        for prompt, ids, completion in zip(settings.prompts, prompts, done, strict=True):
            stats = completion.stats
            samples.append(
                {
                    "way": mode_name(mode),
                    "prompt": prompt,
                    "text": completion.text,
                    "finish_reason": completion.finish_reason,
                    "tokens": stats.tokens,
                    "forwards": stats.forwards,
                    "tokens_per_forward": stats.tokens_per_forward,
                    "tokens_per_second": stats.tokens_per_second,
                    "edits": stats.edits,
                    "prompt_cells": [tokenizer.decode([token]) for token in ids],
                    "trace": trace_record(completion.trace, tokenizer),
                }
            )
    path = context.room / "samples.json"
    write_atomically(path, json.dumps({"machine": machine(device, dtype), "samples": samples}, indent=2) + "\n")
    return {"samples": str(path)}
