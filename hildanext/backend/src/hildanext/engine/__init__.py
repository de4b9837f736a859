"""Ways to answer requests behind one interface. To add one: write the file, add its row, add its case.

Read `base` (what an engine is), `scheduler` (whose turn it is), `runners` (how requests are computed), `local` (one
thread that owns the model). `remote` asks a server elsewhere, `dinfer` runs LLaDA models on NVIDIA GPUs.

A row's class is a frozen section of configuration with `open(model, parent, reason) -> Engine`; it imports what it
needs inside, and the table holds its name only, so that reading the table loads no torch.
"""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from hildanext.core.errors import ConfigError, UnknownChoice
from hildanext.core.registry import build
from hildanext.engine.dinfer import probe as dinfer_probe

if TYPE_CHECKING:
    from hildanext.engine.base import Engine

ENGINES: dict[str, str] = {
    "local": "hildanext.engine.local:LocalEngineConfig",
    "transformers": "hildanext.engine.local:LocalEngineConfig",
    "openai": "hildanext.engine.remote.openai:OpenAIConfig",
    "dinfer": "hildanext.engine.dinfer.config:DInferConfig",
}
"""Name to module and class of its section. `transformers` is the older name of `local`, and what /health calls it."""


@runtime_checkable
class EngineConfig(Protocol):
    """What a row's class offers."""

    def open(self, model: str, parent: str | None, reason: str) -> "Engine":
        """Start it. `reason` says why it was chosen, and is kept in its facts."""


def engine_class(name: str) -> type[EngineConfig]:
    """The class of a row. Raises `UnknownChoice`."""
    if name not in ENGINES:
        raise UnknownChoice("engine", name, ["auto", *ENGINES])
    module, attribute = ENGINES[name].split(":")
    section: type[EngineConfig] = getattr(importlib.import_module(module), attribute)
    return section


def open_engine(section: Mapping[str, Any], model: str, parent: str | None = None) -> "Engine":
    """The engine of a section `{"name": ..., config}`; without a name, or with `auto`, the one that `choose` finds.

    Raises `UnknownChoice`, `ConfigError` for a knob that the engine does not have, and what opening it raises.
    """
    name, reason = choose(section, model)
    return build("engine", {name: engine_class(name)}, {**section, "name": name}).open(model, parent, reason)


def choose(section: Mapping[str, Any], model: str) -> tuple[str, str]:
    """Name of the engine for a section, and why, in words. Loads no weights. Raises `UnknownChoice`, `ConfigError`."""
    name = section.get("name", "auto")
    if not isinstance(name, str):
        raise ConfigError(f"engine name {name!r} is no text", f"choices: auto, {', '.join(ENGINES)}")
    if name != "auto":
        engine_class(name)
        return name, "asked for by name"
    if "base_url" in section:
        return "openai", "chosen automatically: base_url gives the address of a server to ask"
    here = "chosen automatically: no address of a server to ask is given (base_url), and"
    why_not = dinfer_probe.why_unavailable(section, model)
    if why_not:
        return "transformers", f"{here} dInfer, for LLaDA models on NVIDIA GPUs, cannot answer: {why_not}"
    return "dinfer", f"{here} dInfer is installed, runs this model and passes its checks"
