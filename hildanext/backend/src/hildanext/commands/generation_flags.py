"""What `generate` and `generate --server` both read from their flags: prompts, the decoder, the settings."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hildanext.decoding import Decoder
    from hildanext.inference import GenerationConfig

SAMPLING = ("temperature", "top_p", "top_k", "max_post", "window")


def read_prompts(options: argparse.Namespace) -> list[str]:
    from hildanext.core.errors import DataError

    if options.batch is None:
        return [options.prompt if options.prompt is not None else ""]
    try:
        lines = Path(options.batch).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"cannot read {options.batch!r} ({problem})", "give a text file, one prompt per line") from None
    if not lines:
        raise DataError(f"{options.batch!r} is empty", "write one prompt per line")
    return lines


def decoder_section_of(options: argparse.Namespace, run_section: dict[str, Any]) -> dict[str, Any]:
    """Mode, effort, the run's section and single flags, each laid over the one before."""
    from hildanext.decoding import decoder_section

    flags = {name: getattr(options, name) for name in SAMPLING if getattr(options, name) is not None}
    if options.tau_mask is not None:
        flags["tau_mask"] = options.tau_mask
    if options.tau_edit is not None:
        flags["tau_edit"] = None if options.tau_edit == "off" else options.tau_edit
    base = decoder_section(options.mode if options.mode is not None else "S_MODE", options.effort)
    if run_section.get("name", base["name"]) != base["name"]:
        base = {}
    return {**base, **run_section, **flags}


def build_generation(
    options: argparse.Namespace, section: dict[str, Any], run_section: dict[str, Any]
) -> "tuple[Decoder, GenerationConfig]":
    from hildanext.core.config import validate
    from hildanext.decoding import make_decoder
    from hildanext.inference import GenerationConfig

    flags = {"seed": options.seed, "max_new_tokens": options.max_new_tokens, "stop": options.stop}
    given = {name: value for name, value in flags.items() if value is not None}
    settings = validate(
        GenerationConfig, {**run_section, **given, "trace": options.trace is not None}, where="section generation"
    )
    return make_decoder(section), settings


def mode_line(options: argparse.Namespace, section: dict[str, Any]) -> str:
    from hildanext.decoding import MODE_MEANS, mode_name

    name = mode_name(options.mode if options.mode is not None else "S_MODE")
    return f"{name} (published as {MODE_MEANS[name]})"
