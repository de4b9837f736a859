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
    """What is measured. `decode` and `train` hold the knobs of the two measurements."""

    what: Literal["decode", "train"] = "decode"
    model: str | None = None
    """A diffusion checkpoint, or an autoregressive model; None is the one an earlier stage made."""
    parent: str | None = None
    """The autoregressive model beside it while decoding; None is the run's, of a named model its card's."""
    alignment: Literal["block", "parent"] = "parent"
    """Of an untrained conversion."""
    block_size: int = Field(default=32, ge=1)
    """Of an untrained conversion."""
    decode: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)


def check(section: Mapping[str, Any], context: StageContext) -> None:
    """Raises `ConfigError` for unknown keys and sizes that do not divide, `UnknownChoice` for an unknown decoder."""
    from hildanext.bench.decode_speed import DecodeSpeedConfig
    from hildanext.bench.train_speed import TrainSpeedConfig

    settings = validate(BenchConfig, section, where=context.key)
    validate(TrainSpeedConfig, settings.train, where=f"{context.key}.train")
    validate(DecodeSpeedConfig, settings.decode, where=f"{context.key}.decode")


def stage(section: Mapping[str, Any], context: StageContext) -> dict[str, Any]:
    """Measure, and write the numbers."""
    from hildanext.core.run_dir import write_atomically
    from hildanext.core.runtime import set_threads

    settings = validate(BenchConfig, section, where=context.key)
    set_threads(context.threads)
    name = settings.model if settings.model is not None else str(context.outcome("model"))
    result = _measure(settings, context, name)
    path = context.room / "bench.json"
    write_atomically(path, json.dumps({"model": name, **result}, indent=2) + "\n")
    return {"bench": str(path)}


def _measure(settings: BenchConfig, context: StageContext, name: str) -> dict[str, Any]:
    import torch

    from hildanext.bench import decode_speed, train_speed
    from hildanext.core.runtime import choose_device, choose_dtype
    from hildanext.eval.evaluation import load_baseline

    device = choose_device(context.device)
    # Weights are fp32 in training, whose steps autocast.
    dtype = torch.float32 if settings.what == "train" else choose_dtype(context.dtype, device)
    model, _ = open_model(name, settings.alignment, settings.block_size, dtype, device, logger.info)
    if settings.what == "train":
        training = validate(train_speed.TrainSpeedConfig, settings.train, where=f"{context.key}.train")
        return train_speed.measure(model, training, logger.info)
    usual = context.parent if settings.model is None else own_parent(name, model)
    beside = settings.parent if settings.parent is not None else usual
    decoding = validate(decode_speed.DecodeSpeedConfig, settings.decode, where=f"{context.key}.decode")
    return decode_speed.measure(model, load_baseline(beside, model) if beside else None, decoding, logger.info)


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
