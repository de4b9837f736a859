"""How fast decoding or training is here, of a model that an earlier stage made or a named one; written as `bench.json`.

A model that is no diffusion checkpoint is measured untrained, under a new card.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from hildanext.core.config import config, plain, validate
from hildanext.core.errors import ConfigError
from hildanext.core.metrics_log import to_json
from hildanext.core.run_dir import write_atomically
from hildanext.core.runtime import RuntimeConfig, machine, set_threads
from hildanext.recipe import StageContext

if TYPE_CHECKING:
    from hildanext.models.card import Alignment
    from hildanext.models.loading.loaded_model import LoadedModel

logger = logging.getLogger(__name__)

ALIGNMENTS = ("rl", "rl-gradient", "rl-speed")
"""Measurements of the stage `rl`."""

ACCELERATION = ("frontier", "ablations")
"""Tables of ways to write."""


@config
class BenchConfig:
    """What is measured. The sections named as the choices of `what` hold the knobs of the measurements."""

    what: Literal[
        "decode", "engine", "train", "answers", "exact", "peers", "frontier", "ablations", "rl", "rl-gradient",
        "rl-speed",
    ] = "decode"  # fmt: skip
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
    frontier: dict[str, Any] = Field(default_factory=dict)
    ablations: dict[str, Any] = Field(default_factory=dict)
    rl: dict[str, Any] = Field(default_factory=dict)
    rl_gradient: dict[str, Any] = Field(default_factory=dict)
    rl_speed: dict[str, Any] = Field(default_factory=dict)
    save: bool = False
    """Of the frontier: write its best setting into the checkpoint's card, where mode `fast` finds it."""

    def __post_init__(self) -> None:
        if self.save and self.what != "frontier":
            raise ConfigError(f"save is about a frontier, and {self.what!r} is measured", "leave it out")


def section_name(what: str) -> str:
    """The section that holds the knobs of a measurement."""
    return what.replace("-", "_")


def check(section: Mapping[str, Any], context: StageContext) -> None:
    """Raises `ConfigError` for unknown keys and sizes that do not divide, `UnknownChoice` for an unknown decoder."""
    settings = validate(BenchConfig, section, where=context.key)
    for what in {"train", "decode"} - {settings.what}:
        _knobs(what, getattr(settings, what), replace(context, dtype="auto"))  # a training has no fp64
    _knobs(settings.what, getattr(settings, section_name(settings.what)), context)


def stage(section: Mapping[str, Any], context: StageContext) -> dict[str, Any]:
    """Measure, and write the numbers."""
    result, _ = measure(section, context, logger.info)
    path = context.stage_dir / "bench.json"
    write_atomically(path, to_json(result, indent=2) + "\n")
    write_beside(result, path)
    return {"bench": str(path)}


def write_beside(result: Mapping[str, Any], path: Path) -> list[Path]:
    """Markdown and a picture beside the JSON of a measurement that has them; returns what was written."""
    from hildanext.bench import exact_report
    from hildanext.bench.acceleration import ablations_report, frontier_report
    from hildanext.bench.rl import comparison_report, gradient_report, speed_report

    reports: dict[str, Any] = {
        "frontier": frontier_report,
        "ablations": ablations_report,
        "exact": exact_report,
        "peers": exact_report,
        "rl": comparison_report,
        "rl-gradient": gradient_report,
        "rl-speed": speed_report,
    }
    report = reports.get(str(result["bench"]))
    if report is None:
        return []
    write_atomically(path.with_suffix(".md"), report.markdown(result))
    written = [path.with_suffix(".md")]
    if hasattr(report, "draw"):
        written.append(report.draw(result, path.with_suffix(".png")))
    return written


def measure(
    section: Mapping[str, Any], context: StageContext, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[Any]]:
    """The numbers, and tables of them."""
    from hildanext.ar import Parent

    settings = validate(BenchConfig, section, where=context.key)
    what = settings.what
    speed, knobs = _knobs(what, getattr(settings, section_name(what)), context)
    runtime = context.runtime_config
    if what in ("train", "answers"):
        runtime = replace(runtime, dtype="fp32")  # as in training, whose steps autocast
    start = getattr(knobs, "start", None)
    name = start or (settings.model if settings.model is not None else str(context.outcome("model")))
    if what in ("exact", "peers"):
        from hildanext.bench import exact_report

        beside = settings.parent if settings.parent is not None else context.parent
        compared = speed.measure(name, beside, runtime, knobs, what == "peers", say)
        return {"model": name, **compared}, exact_report.tables(compared)
    if what in ALIGNMENTS:
        return _of_alignment(what, name, knobs, context, say)
    if what in ACCELERATION:
        return _of_acceleration(settings, name, knobs, context, say)
    opened = open_model(name, runtime, settings.alignment, settings.block_size, say)
    measured: list[Any] = [opened.model]
    if what in ("answers", "engine"):
        measured.append(opened.tokenizer)
    if what in ("decode", "engine"):
        named = [parent for parent in (settings.parent, context.parent, opened.parent_name) if parent is not None]
        measured.append(Parent(*opened.parent(named[0])) if named[0] else None)
    result = speed.measure(*measured, knobs, say)
    return {"model": name, **result}, speed.tables(result)


def _of_acceleration(
    settings: BenchConfig, name: str, knobs: Any, context: StageContext, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[Any]]:
    """Ways to write faster, beside the parent that they are judged by. Raises `ConfigError` where there is none."""
    from hildanext.ar import Parent
    from hildanext.bench.acceleration import ablations, ablations_report, frontier, frontier_report

    runtime = context.runtime_config
    opened = open_model(name, runtime, settings.alignment, settings.block_size, say)
    if settings.save and opened.untrained:
        raise ConfigError(f"{name!r} is no diffusion checkpoint, and has no card to write into", "leave save out")
    named = [one for one in (settings.parent, context.parent, opened.parent_name) if one]
    if settings.parent == "" or not named:
        raise ConfigError("no parent judges what is written", "name one: --parent")
    parent = Parent(*opened.parent(named[0]))
    if settings.what == "ablations":
        result = ablations.measure(opened, parent, runtime, knobs, context.stage_dir, say, context.quiet)
        return {"model": name, **result}, ablations_report.tables({"model": name, **result})
    # A verb's folder is the file that it writes, if any.
    beside = context.folder.with_suffix(".cells") if context.folder.name else None
    cells = beside if context.alone else context.stage_dir / "cells"
    if cells is not None:
        cells.mkdir(parents=True, exist_ok=True)
    result = {"model": name, **frontier.measure(opened, parent, runtime, knobs, cells, say)}
    if settings.save:
        path, chosen = frontier.save(result, name)
        say(f"mode fast: {chosen.decoder}, {chosen.tokens_per_forward:.2f} tokens per forward, written into {path}")
    return result, frontier_report.tables(result)


def _of_alignment(
    what: str, name: str, knobs: Any, context: StageContext, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[Any]]:
    """Measurements of the stage `rl`, which opens models itself."""
    from hildanext.bench.rl import comparison, comparison_report, gradient, gradient_report, speed, speed_report
    from hildanext.bench.rl.drawn_gradients import measure_drawn
    from hildanext.models.loading.loaded_model import LoadedModel

    if what == "rl":
        result = comparison.measure(name, knobs, context.stage_dir, context.profile, say)
        return result, comparison_report.tables(result)
    if what == "rl-speed":
        set_threads(context.threads)
        result = speed.measure(name, knobs, context.profile, say)
        return result, speed_report.tables(result)
    runtime = replace(context.runtime_config, dtype="fp32")
    drawn = None
    small = gradient.measure_small(knobs, say)
    if knobs.draws:
        opened = LoadedModel.open(name, runtime)
        drawn = measure_drawn(opened.model, opened.tokenizer, knobs, context.profile, say)
    result = {
        "bench": what,
        "model": name,
        "settings": plain(knobs),
        "machine": drawn["machine"] if drawn is not None else machine(),
        "small": small,
        "drawn": drawn,
    }
    return result, gradient_report.tables(result)


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
    if what in ALIGNMENTS:
        return None, _alignment_knobs(what, section, context)
    if what in ACCELERATION:
        return None, _acceleration_knobs(what, section, context)
    module, kind = modules[what]
    usual: dict[str, Any] = {"seed": context.seed}
    if what in ("train", "answers"):
        usual["precision"] = context.precision
    return module, validate(kind, {**usual, **section}, where=f"{context.key}.{what}")


def _acceleration_knobs(what: str, section: Mapping[str, Any], context: StageContext) -> Any:
    from hildanext.bench.acceleration.ablations import AblationsConfig
    from hildanext.bench.acceleration.frontier import FrontierConfig
    from hildanext.bench.acceleration.sweeps import default_sweeps

    given = dict(section)
    if what == "frontier":
        given.setdefault("sweeps", default_sweeps(context.profile))
    kind: type[Any] = FrontierConfig if what == "frontier" else AblationsConfig
    return validate(kind, given, where=f"{context.key}.{what}")


def _alignment_knobs(what: str, section: Mapping[str, Any], context: StageContext) -> Any:
    """Knobs of a measurement of the stage `rl`, whose sections are over the run's device and dtype."""
    from hildanext.bench.rl import config as rl_config
    from hildanext.bench.rl import gradient, speed

    where = f"{context.key}.{section_name(what)}"
    given = dict(section)
    if what == "rl-gradient":
        return validate(gradient.RlGradientConfig, {"seed": context.seed, **given}, where=where)
    kind: type[Any] = rl_config.RlComparisonConfig if what == "rl" else speed.RlSpeedConfig
    shared = given.get("shared", kind.usual())
    if isinstance(shared, Mapping):
        given["shared"] = {key: value for key, value in context.training(shared).items() if key != "seed"}
    if what == "rl-speed":
        given.setdefault("seed", context.seed)
    return validate(kind, given, where=where)


def open_model(
    name: str, runtime: "RuntimeConfig", alignment: "Alignment", block_size: int, say: Callable[[str], None]
) -> "LoadedModel":
    """`LoadedModel.open_or_convert`; an untrained model is told of."""
    from hildanext.models.loading.loaded_model import LoadedModel

    opened = LoadedModel.open_or_convert(name, runtime, alignment, block_size)
    if opened.untrained:
        say(f"{name} is not a diffusion checkpoint: measuring it untrained, alignment {alignment}")
    return opened
