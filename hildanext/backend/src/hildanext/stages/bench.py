"""How fast decoding or training is here, of a model that an earlier stage made or a named one; written as `bench.json`.

A model that is no diffusion checkpoint is measured untrained, under a new card.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from hildanext.core.config import config, validate
from hildanext.core.metrics_log import to_json
from hildanext.core.run_dir import write_atomically
from hildanext.recipe import StageContext

if TYPE_CHECKING:
    from hildanext.core.runtime import RuntimeConfig
    from hildanext.models.card import Alignment
    from hildanext.models.loading.loaded_model import LoadedModel

logger = logging.getLogger(__name__)


@config
class BenchConfig:
    """What is measured. The sections named as the choices of `what` hold the knobs of the measurements."""

    what: Literal["decode", "engine", "train", "answers", "exact", "peers"] = "decode"
    model: str | None = None
    """A diffusion checkpoint, or an autoregressive model; None is the one an earlier stage made. Of exact decoding and
    its peers: draft adapters."""
    parent: str | None = None
    """The autoregressive model beside it while decoding, "" for none; None is the run's, else the card's."""
    alignment: Literal["block", "parent"] = "parent"
    """Of an untrained conversion."""
    block_size: int = Field(default=32, ge=1)
    """Of an untrained conversion."""
    decode: dict[str, Any] = Field(default_factory=dict)
    engine: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    answers: dict[str, Any] = Field(default_factory=dict)
    exact: dict[str, Any] = Field(default_factory=dict)
    peers: dict[str, Any] = Field(default_factory=dict)


def check(section: Mapping[str, Any], context: StageContext) -> None:
    """Raises `ConfigError` for unknown keys and sizes that do not divide, `UnknownChoice` for an unknown decoder."""
    settings = validate(BenchConfig, section, where=context.key)
    for what in {"train", "decode"} - {settings.what}:
        _knobs(what, getattr(settings, what), replace(context, dtype="auto"))  # a training has no fp64
    _knobs(settings.what, getattr(settings, settings.what), context)


def stage(section: Mapping[str, Any], context: StageContext) -> dict[str, Any]:
    """Measure, and write the numbers."""
    result, _ = measure(section, context, logger.info)
    path = context.stage_dir / "bench.json"
    write_atomically(path, to_json(result, indent=2) + "\n")
    return {"bench": str(path)}


def measure(
    section: Mapping[str, Any], context: StageContext, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[Any]]:
    """The numbers, and tables of them."""
    from hildanext.ar import Parent

    settings = validate(BenchConfig, section, where=context.key)
    what = settings.what
    speed, knobs = _knobs(what, getattr(settings, what), context)
    runtime = context.runtime_config
    if what in ("train", "answers"):
        runtime = replace(runtime, dtype="fp32")  # as in training, whose steps autocast
    name = settings.model if settings.model is not None else str(context.outcome("model"))
    if what in ("exact", "peers"):
        from hildanext.bench import exact_report

        beside = settings.parent if settings.parent is not None else context.parent
        compared = speed.measure(name, beside, runtime, knobs, what == "peers", say)
        return {"model": name, **compared}, exact_report.tables(compared)
    opened = open_model(name, runtime, settings.alignment, settings.block_size, say)
    measured: list[Any] = [opened.model]
    if what in ("answers", "engine"):
        measured.append(opened.tokenizer)
    if what in ("decode", "engine"):
        named = [parent for parent in (settings.parent, context.parent, opened.parent_name) if parent is not None]
        measured.append(Parent(*opened.parent(named[0])) if named[0] else None)
    result = speed.measure(*measured, knobs, say)
    return {"model": name, **result}, speed.tables(result)


def _knobs(what: str, section: Mapping[str, Any], context: StageContext) -> tuple[Any, Any]:
    """The module that measures it, and its knobs. Raises `ConfigError`."""
    from hildanext.bench import answer_speed, decode_speed, engine_speed, exact_speed, train_speed

    modules: dict[str, tuple[Any, type[Any]]] = {
        "decode": (decode_speed, decode_speed.DecodeSpeedConfig),
        "engine": (engine_speed, engine_speed.EngineSpeedConfig),
        "train": (train_speed, train_speed.TrainSpeedConfig),
        "answers": (answer_speed, answer_speed.AnswerSpeedConfig),
        "exact": (exact_speed, exact_speed.ExactSpeedConfig),
        "peers": (exact_speed, exact_speed.ExactSpeedConfig),
    }
    module, kind = modules[what]
    usual: dict[str, Any] = {"seed": context.seed}
    if what in ("train", "answers"):
        usual["precision"] = context.precision
    return module, validate(kind, {**usual, **section}, where=f"{context.key}.{what}")


def open_model(
    name: str, runtime: "RuntimeConfig", alignment: "Alignment", block_size: int, say: Callable[[str], None]
) -> "LoadedModel":
    """`LoadedModel.open_or_convert`; an untrained model is told of."""
    from hildanext.models.loading.loaded_model import LoadedModel

    opened = LoadedModel.open_or_convert(name, runtime, alignment, block_size)
    if opened.untrained:
        say(f"{name} is not a diffusion checkpoint: measuring it untrained, alignment {alignment}")
    return opened
