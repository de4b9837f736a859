"""What `generate` and `generate --server` both read from their flags: prompts, the decoder, the settings.

Every knob of a decoder is a flag: they are made from the source of the decoders, since importing one loads torch.
"""

import argparse
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hildanext.commands import open_stage
from hildanext.core.errors import ConfigError, DataError
from hildanext.core.knobs import Knob, knobs_in

if TYPE_CHECKING:
    from hildanext.core.runtime import RuntimeConfig
    from hildanext.inference import GenerationConfig
    from hildanext.stages.generate import SampleConfig

DECODING = Path(__file__).parents[1] / "decoding"


def add_decoder_flags(parser: argparse.ArgumentParser) -> None:
    """--decoder, its presets, and a flag for each knob of each decoder; all are also --set decoder.KNOB=VALUE."""
    family = knobs_in(DECODING, "DECODERS")
    parser.add_argument("--decoder", metavar="NAME", help=f"{', '.join(family)}; any of its knobs: --set decoder.X=Y")
    parser.add_argument("--mode", help="S_MODE (default; alias speed) or Q_MODE (alias quality)")
    parser.add_argument("--effort", help="instant, low, medium, high or adaptive: knobs laid over the mode")
    parser.set_defaults(knobs=[])
    for name, knobs in family.items():
        group = parser.add_argument_group(f"knobs of {name}")
        for knob in knobs:
            with suppress(argparse.ArgumentError):  # the name is a flag already: --set decoder.X=Y remains
                _add_flag(group, knob)


def _add_flag(group: argparse._ArgumentGroup, knob: Knob) -> None:
    """A flag that gives a pair to `options.knobs`; a switch needs no value."""

    def read(text: str) -> tuple[str, Any]:
        from hildanext.core.config import read_value

        return knob.name, "off" if text.lower() in ("off", "none") else read_value(text)

    switch: dict[str, Any] = {"nargs": "?", "const": (knob.name, True)} if knob.type == "bool" else {}
    flag, value = f"--{knob.name.replace('_', '-')}", f"{knob.type.upper()}{' or off' if knob.optional else ''}"
    group.add_argument(
        flag, dest="knobs", action="append", type=read, help=knob.help.replace("%", "%%"), metavar=value, **switch
    )


def read_prompts(options: argparse.Namespace) -> list[str]:
    if options.batch is None:
        return [options.prompt if options.prompt is not None else ""]
    try:
        lines = Path(options.batch).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"cannot read {options.batch!r} ({problem})", "give a text file, one prompt per line") from None
    if not lines:
        raise DataError(f"{options.batch!r} is empty", "write one prompt per line")
    return lines


class Generation(NamedTuple):  # as `Knob`: help loads no dataclasses
    """What is asked of a model, here or elsewhere."""

    texts: list[str]
    modes: dict[str, dict[str, Any]]
    """A decoder's section by the mode's name."""
    config: "GenerationConfig"
    model: str | None
    chat: bool
    runtime: "RuntimeConfig"


def read_generation(options: argparse.Namespace, defaults: Mapping[str, Any] | None = None) -> Generation:
    """The section `generate` of the run with the flags in it, checked. Raises `ConfigError` and its like."""
    from hildanext.core.config import validate
    from hildanext.stages.generate import SampleConfig, decoder_sections, generation_config

    section, context = open_stage(options, lambda section: _folded(section, options), defaults)
    settings = validate(SampleConfig, section, "generate")
    texts, modes = _texts(options, settings), decoder_sections(settings, context)
    if len(modes) > 1 and (options.trace is not None or options.server is not None):
        flag = "--trace" if options.trace is not None else "--server"
        raise ConfigError(f"{flag} is about one mode, and the run names {', '.join(modes)}", "choose one with --mode")
    config = generation_config(settings, context, trace=options.trace is not None)
    return Generation(texts, modes, config, settings.model, settings.chat, context.runtime)


def _folded(section: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The section with the flags in it; --prompt and --batch stand in place of its prompts."""
    from hildanext.core.config import merge

    if options.prompt is not None or options.batch is not None:
        section = {key: value for key, value in section.items() if key not in ("prompts", "prompts_file")}
    flags = {name: getattr(options, name) for name in ("seed", "max_new_tokens", "stop", "effort", "model")}
    flags |= {"chat": options.chat or None, "modes": [options.mode] if options.mode is not None else None}
    named = {"decoder": {"name": options.decoder}} if options.decoder is not None else {}
    decoder = {**merge({"decoder": section.get("decoder", {})}, named)["decoder"], **dict(options.knobs)}
    return {**section, **{name: value for name, value in flags.items() if value is not None}, "decoder": decoder}


def _texts(options: argparse.Namespace, settings: "SampleConfig") -> list[str]:
    """Of --prompt or --batch, else of the section. Raises `DataError`."""
    if options.prompt is None and options.batch is None and settings.prompts is not None:
        return list(settings.prompts)
    if settings.prompts_file is None:
        return read_prompts(options)
    from hildanext.data.prompts import read_prompts as read_file

    prompts = read_file(settings.prompts_file)
    if any(prompt.text is None for prompt in prompts):
        raise DataError(f"{settings.prompts_file!r} holds conversations", "answer them in a job or a recipe")
    return [str(prompt.text) for prompt in prompts]


def mode_line(name: str) -> str:
    from hildanext.decoding import MODE_MEANS

    return f"{name} (published as {MODE_MEANS[name]})" if name in MODE_MEANS else name
