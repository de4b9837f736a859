"""The settings of a frontier: one knob of a decoder over a list of values, each with the fallbacks that it can have."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from hildanext.bench.acceleration.ways import Way
from hildanext.core.config import config
from hildanext.core.errors import ConfigError
from hildanext.decoding import DIFFUSION_MODES, MODES, make_decoder
from hildanext.eval.generation import ONE_PER_STEP

FALLBACKS = ("confident", "left", "entropy")
BASE = "one per step"
"""What the others are set beside."""


@config
class Sweep:
    """One knob over its values."""

    decoder: dict[str, Any]
    """A decoder's section."""
    knob: str = "tau_mask"
    """The knob's name in it; `reveal.gamma` is the rule's."""
    values: tuple[float, ...] = Field(min_length=1)
    fallbacks: tuple[str, ...] = FALLBACKS
    """() where the decoder has none, or its rule always fills a mask itself."""

    def ways(self, name: str) -> list[Way]:
        """One for each value and fallback."""
        found = []
        for value in self.values:
            for fallback in self.fallbacks if self.fallbacks else (None,):
                section = _with(self.decoder, self.knob, value)
                more = {} if fallback is None else {"fallback": fallback}
                label = f"{name} {value:g}" + ("" if fallback is None else f", {fallback}")
                found.append(Way(label, {**section, **more}))
        return found


def _with(section: Mapping[str, Any], knob: str, value: float) -> dict[str, Any]:
    """The section with a knob, whose name may have points, set. Raises `ConfigError` where a part of it is none."""
    head, point, rest = knob.partition(".")
    if not point:
        return {**section, head: value}
    inner = section.get(head)
    if not isinstance(inner, Mapping):
        raise ConfigError(f"knob {knob!r}: the decoder's {head!r} is no section", f'give {{"{head}": {{"name": ...}}}}')
    return {**section, head: _with(inner, rest, value)}


def _rule(tau: float, name: str, **knobs: Any) -> dict[str, Any]:
    return {**ONE_PER_STEP, "tau_mask": tau, "reveal": {"name": name, **knobs}}


def default_sweeps(profile: str) -> dict[str, Sweep]:
    """Every rule of filling without editing; research ones under FULL alone. `factor`, `entropy_bound` and `card`
    always fill a mask themselves and have no fallback."""
    taus = (0.7, 0.5, 0.4, 0.3)
    sweeps = {
        "threshold": Sweep(decoder=dict(ONE_PER_STEP), values=taus),
        "factor": Sweep(decoder=_rule(1.0, "factor"), knob="reveal.f", values=(0.5, 1.0, 1.5, 2.0), fallbacks=()),
        "entropy_bound": Sweep(
            decoder=_rule(1.0, "entropy_bound"), knob="reveal.gamma", values=(0.1, 0.5, 1.0, 1.5, 2.0), fallbacks=()
        ),
        "klass": Sweep(decoder=_rule(0.5, "klass", epsilon=0.1, history=1), values=(0.5, 0.4, 0.3)),
        "credit": Sweep(decoder=_rule(0.5, "credit"), values=(0.7, 0.5, 0.4)),
        "hierarchical": Sweep(decoder=_rule(0.5, "hierarchical"), knob="reveal.low", values=(0.4, 0.3, 0.2)),
    }
    if profile == "FULL":
        run = _rule(0.5, "card", run=True)
        sweeps["card, run"] = Sweep(decoder=run, values=taus[1:], fallbacks=())
    return sweeps


def ways_of(sweeps: Mapping[str, Sweep], modes: bool) -> list[Way]:
    """One token a step with each fallback, the modes, and all of the sweeps, checked.

    Raises `UnknownChoice`, and `ConfigError` for a knob that a decoder does not have or a value out of its range.
    """
    ways = [Way(BASE, dict(ONE_PER_STEP))]
    ways += [Way(f"{BASE}, {one}", {**ONE_PER_STEP, "fallback": one}) for one in FALLBACKS[1:]]
    ways += [Way(mode, dict(MODES[mode])) for mode in DIFFUSION_MODES] if modes else []
    ways += [way for name, sweep in sweeps.items() for way in sweep.ways(name)]
    for way in ways:
        assert way.section is not None
        make_decoder(way.section)
    return ways
