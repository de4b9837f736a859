"""How fast decoding or training is here, of a model that an earlier stage made or a named one; written as `bench.json`.

A model that is no diffusion checkpoint is measured untrained, under a new card.
"""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from hildanext.core.config import config, validate
from hildanext.core.errors import ModelError
from hildanext.recipe import StageContext

if TYPE_CHECKING:
    import torch

    from hildanext.models import DiffusionModel

logger = logging.getLogger(__name__)


@config
class BenchConfig:
    """What is measured. `decode`, `engine`, `train` and `answers` hold the knobs of the measurements."""

    what: Literal["decode", "engine", "train", "answers"] = "decode"
    model: str | None = None
    """A diffusion checkpoint, or an autoregressive model; None is the one an earlier stage made."""
    parent: str | None = None
    """The autoregressive model beside it while decoding; None is the run's, of a named model its card's."""
    alignment: Literal["block", "parent"] = "parent"
    """Of an untrained conversion."""
    block_size: int = Field(default=32, ge=1)
    """Of an untrained conversion."""
    decode: dict[str, Any] = Field(default_factory=dict)
    engine: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    answers: dict[str, Any] = Field(default_factory=dict)


def check(section: Mapping[str, Any], context: StageContext) -> None:
    """Raises `ConfigError` for unknown keys and sizes that do not divide, `UnknownChoice` for an unknown decoder."""
    settings = validate(BenchConfig, section, where=context.key)
    for what in ("train", "decode", settings.what):
        _knobs(what, getattr(settings, what), f"{context.key}.{what}")


def stage(section: Mapping[str, Any], context: StageContext) -> dict[str, Any]:
    """Measure, and write the numbers."""
    from hildanext.core.run_dir import write_atomically

    settings = validate(BenchConfig, section, where=context.key)
    result, _ = measure(settings, context, f"{context.key}.{settings.what}", logger.info)
    path = context.stage_dir / "bench.json"
    write_atomically(path, json.dumps(result, indent=2) + "\n")
    return {"bench": str(path)}


def measure(
    settings: BenchConfig, context: StageContext, where: str, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[Any]]:
    """The numbers, and tables of them. `where` names the knobs of the measurement in an error."""
    import torch

    from hildanext.eval.evaluation import load_baseline

    what = settings.what
    speed, knobs = _knobs(what, getattr(settings, what), where)
    device, dtype = context.open_device()
    if what in ("train", "answers"):
        dtype = torch.float32  # as in training, whose steps autocast
    name = settings.model if settings.model is not None else str(context.outcome("model"))
    model, tokenizer = open_model(name, settings.alignment, settings.block_size, dtype, device, say)
    measured: list[Any] = [model]
    if what in ("answers", "engine"):
        measured.append(tokenizer)
    if what in ("decode", "engine"):
        usual = context.parent if settings.model is None else own_parent(name, model)
        beside = settings.parent if settings.parent is not None else usual
        measured.append(load_baseline(beside, model) if beside else None)
    result = speed.measure(*measured, knobs, say)
    return {"model": name, **result}, speed.tables(result)


def _knobs(what: str, section: Mapping[str, Any], where: str) -> tuple[Any, Any]:
    """The module that measures it, and its knobs. Raises `ConfigError`."""
    from hildanext.bench import answer_speed, decode_speed, engine_speed, train_speed

    modules: dict[str, tuple[Any, type[Any]]] = {
        "decode": (decode_speed, decode_speed.DecodeSpeedConfig),
        "engine": (engine_speed, engine_speed.EngineSpeedConfig),
        "train": (train_speed, train_speed.TrainSpeedConfig),
        "answers": (answer_speed, answer_speed.AnswerSpeedConfig),
    }
    module, kind = modules[what]
    return module, validate(kind, section, where=where)


def open_model(
    name: str,
    alignment: Literal["block", "parent"],
    block_size: int,
    dtype: "torch.dtype",
    device: "torch.device",
    say: Callable[[str], None],
) -> tuple["DiffusionModel", Any]:
    """A diffusion checkpoint where the name is one, else an autoregressive model under a new card; its tokenizer."""
    from hildanext.models.card import CARD
    from hildanext.models.loading.load import load_diffusion
    from hildanext.models.loading.names import locate_diffusion
    from hildanext.models.start import start_conversion

    try:
        place: Path | None = locate_diffusion(name)
    except ModelError:
        place = None
    if place is not None and (place / CARD).is_file():
        return load_diffusion(name, dtype, device)
    say(f"{name} is not a diffusion checkpoint: measuring it untrained, alignment {alignment}")
    model, tokenizer = start_conversion(name, alignment, block_size, dtype, device)
    return model.eval(), tokenizer


def own_parent(name: str, model: "DiffusionModel") -> str:
    """The autoregressive model that this one was made of; "" where that is not known."""
    from hildanext.models.card import CARD

    converted = name == "tiny" or (Path(name) / CARD).is_file()
    return model.card.parent if converted else name
