"""What `generate` and `generate --server` both read from their flags: prompts, the decoder, the settings.

Every knob of a decoder is a flag: they are made from the source of the decoders, since importing one loads torch.
"""

import argparse
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hildanext.core.knobs import Knob
    from hildanext.decoding import Decoder
    from hildanext.inference import GenerationConfig

DECODING = Path(__file__).parents[1] / "decoding"


def add_decoder_flags(parser: argparse.ArgumentParser) -> None:
    """--decoder, its presets, and a flag for each knob of each decoder; all are also --set decoder.KNOB=VALUE."""
    from hildanext.core.knobs import knobs_in

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


def _add_flag(group: argparse._ArgumentGroup, knob: "Knob") -> None:
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
    from hildanext.core.config import merge
    from hildanext.decoding import decoder_section

    named = {"decoder": {"name": options.decoder}} if options.decoder is not None else {}
    section = merge({"decoder": run_section}, named)["decoder"]
    return decoder_section(options.mode, options.effort, section, **dict(options.knobs))


def build_generation(
    options: argparse.Namespace, section: dict[str, Any], run_section: dict[str, Any]
) -> "tuple[Decoder, GenerationConfig]":
    from hildanext.core.config import validate
    from hildanext.decoding import make_decoder
    from hildanext.inference import GenerationConfig

    flags = {"seed": options.seed, "max_new_tokens": options.max_new_tokens, "stop": options.stop}
    overrides = {name: value for name, value in flags.items() if value is not None}
    settings = validate(
        GenerationConfig, {**run_section, **overrides, "trace": options.trace is not None}, where="section generation"
    )
    return make_decoder(section), settings


def mode_line(options: argparse.Namespace, section: dict[str, Any]) -> str:
    from hildanext.decoding import MODE_MEANS, MODES, mode_name

    name = mode_name(options.mode if options.mode is not None else "S_MODE")
    if section["name"] != MODES[name]["name"]:
        return str(section["name"])
    return f"{name} (published as {MODE_MEANS[name]})"
