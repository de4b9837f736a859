"""Ways to fill a masked canvas. To add one: write the file, add its row, add its case.

In reading order:

- `base`: what a decoder is (`Canvas` in, `Edit` out), and the one loop that runs it (`run`, `step`);
- `threshold_edit`: the first member, where masks are filled and written tokens edited;
- `reveal`: the rules by which it fills them;
- `residual`: the same, whose masks are fed with what was thought of them;
- `ordered`: a fixed number of masks a step, in one of `orders`;
- `pruned`: the same without its last steps;
- `s2d2`: drafts of a block that the model's own block-size-1 mode (`block_size_one`) confirms;
- `order_token_search`: several texts of a prompt (`beams`) that branch and are chosen among, with a driver of its own;
- `sequence`: a document that is being written, and a record of what a forward did to it;
- `feed_plan`: which tokens of it go into a forward;
- `commit`: where and when a finished block's keys and values are committed;
- `state`: the model's side, which does these three for many rows at once;
- `per_row`: rows with decoders of their own in one forward;
- `trajectory`: what was written, as arrays to learn from;
- `detokenizer` and `trace`: what is shown of it.

From logits to a candidate: `hildanext.models.sampling`.
"""

from collections.abc import Mapping
from typing import Any

from hildanext.core.config import may_be_none
from hildanext.core.errors import ConfigError, UnknownChoice
from hildanext.core.registry import build
from hildanext.decoding.base import Canvas, Decoder, Denoiser, Edit
from hildanext.decoding.exact.policy import ExactConfig
from hildanext.decoding.order_token_search import OrderTokenSearch
from hildanext.decoding.ordered import Ordered
from hildanext.decoding.pruned import Pruned
from hildanext.decoding.residual import Residual
from hildanext.decoding.s2d2 import S2D2
from hildanext.decoding.threshold_edit import ThresholdEdit

DECODERS: dict[str, type[Decoder]] = {
    "threshold_edit": ThresholdEdit,
    "ordered": Ordered,
    "pruned": Pruned,
    "s2d2": S2D2,
    "residual": Residual,
    "order_token_search": OrderTokenSearch,
}

EXACT: dict[str, type[ExactConfig]] = {
    "exact": ExactConfig,
}
"""What a section may name besides: no decoder of a diffusion model, but drafts that an autoregressive parent judges."""

MODES: dict[str, dict[str, Any]] = {
    "S_MODE": {"name": "threshold_edit", "tau_mask": 0.5, "tau_edit": 0.0, "max_post": 16},
    "Q_MODE": {"name": "threshold_edit", "tau_mask": 0.7, "tau_edit": 0.5, "max_post": 16},
    "exact": {"name": "exact"},
}
"""LLaDA2.1's published presets: S is its Speedy one (fills early, edits on any disagreement), Q its Quality one. And
exact: the parent's own text."""

DIFFUSION_MODES = tuple(mode for mode, section in MODES.items() if section["name"] in DECODERS)
"""Those of a diffusion model."""

FAST = "fast"
"""A mode of its own for each checkpoint: the setting that `hildanext bench frontier --save` wrote into its card."""

MODE_ALIASES: dict[str, str] = {"speed": "S_MODE", "quality": "Q_MODE"}

MODE_MEANS: dict[str, str] = {"S_MODE": "speed", "Q_MODE": "quality"}
"""What a mode is published as. What it is for a model and a prompt, each run prints: tokens/s, tokens per forward."""

EFFORTS: dict[str, dict[str, Any]] = {
    "instant": {"tau_mask": 0.3, "tau_edit": None, "max_post": 0},
    "low": {"tau_mask": 0.5, "tau_edit": 0.0, "max_post": 2},
    "medium": {},
    "high": {"tau_mask": 0.9, "tau_edit": 0.5, "max_post": 16},
    "adaptive": {"tau_cautious": 0.95},
}
"""Knobs laid over a mode: a first draft without editing; few corrections; the mode as it is; nearly one token at
a time, with editing; the mode's threshold where the model is sure and 0.95 where it is not."""


def mode_name(mode: str) -> str:
    """The mode's own name, of a name or an alias in any case. Raises `UnknownChoice`."""
    names = {**{name.lower(): name for name in (*MODES, FAST)}, **MODE_ALIASES}
    if mode.lower() not in names:
        raise UnknownChoice("mode", mode, [*MODES, *MODE_ALIASES, FAST])
    return names[mode.lower()]


def decoder_section(
    mode: str | None = None,
    effort: str | None = None,
    over: Mapping[str, Any] | None = None,
    fast: Mapping[str, Any] | None = None,
    /,
    **knobs: Any,
) -> dict[str, Any]:
    """The section of a mode (S_MODE where none is named), an effort over it, a section over both, and single knobs.

    `fast` is the section of that mode, which is the checkpoint's own. Raises `ConfigError` where it is asked for and
    not there.

    "off" is None for each knob that may be None: this is the one place that knows. Raises `UnknownChoice`, and
    `ConfigError` for a mode or an effort of another decoder than the section's.
    """
    if effort is not None and effort not in EFFORTS:
        raise UnknownChoice("effort", effort, EFFORTS)
    named = mode_name(mode if mode is not None else "S_MODE")
    if named == FAST and fast is None:
        raise ConfigError(
            "mode 'fast' is what was measured for a checkpoint, and this one's card has no such setting",
            "measure one: hildanext bench frontier --model NAME --save",
        )
    base = dict(fast if named == FAST and fast is not None else MODES[named])
    if effort is not None and base["name"] in EXACT:
        raise ConfigError(f"efforts lie over the modes of a diffusion model, not over {base['name']!r}", "leave it out")
    base |= EFFORTS.get(str(effort), {})
    chosen = {**(over if over is not None else {}), **knobs}
    name = chosen.get("name", base["name"])
    if name != base["name"]:
        if mode is not None or effort is not None:
            raise ConfigError(f"modes and efforts are presets of {base['name']!r}, not of {name!r}", "leave them out")
        base = {}
    table = methods()
    off = may_be_none(table[name]) if isinstance(name, str) and name in table else frozenset()
    return {**base, **{key: None if value == "off" and key in off else value for key, value in chosen.items()}}


def make_decoder(section: Mapping[str, Any], strict: bool = False) -> Decoder:
    """A decoder from its section. Raises `UnknownChoice`, or `ConfigError` for a knob out of range and for exact mode,
    which is no decoder."""
    if section.get("name") in EXACT:
        raise ConfigError(
            "exact mode is not for this: the text it writes is the autoregressive parent's",
            "measure the parent, or write with hildanext generate, chat and serve",
        )
    return build("decoder", DECODERS, section, strict)


def make_method(section: Mapping[str, Any], strict: bool = False) -> Decoder | ExactConfig:
    """A decoder, or the knobs of exact mode, from a section. Raises as `make_decoder`."""
    method: Decoder | ExactConfig = build("decoder", methods(), section, strict)
    return method


def methods() -> dict[str, type[Any]]:
    """All that a section may name."""
    return {**DECODERS, **EXACT}


__all__ = [
    "DECODERS",
    "DIFFUSION_MODES",
    "EFFORTS",
    "EXACT",
    "FAST",
    "MODES",
    "MODE_ALIASES",
    "MODE_MEANS",
    "S2D2",
    "Canvas",
    "Decoder",
    "Denoiser",
    "Edit",
    "ExactConfig",
    "OrderTokenSearch",
    "Ordered",
    "Residual",
    "ThresholdEdit",
    "decoder_section",
    "make_decoder",
    "make_method",
    "methods",
    "mode_name",
]
