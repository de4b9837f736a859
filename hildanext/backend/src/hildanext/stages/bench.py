"""How fast decoding or training is here, of a model that an earlier stage made or a named one; written as `bench.json`.

A model that is no diffusion checkpoint is measured untrained, under a new card.
"""

import json
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from hildanext.core.config import config, validate
from hildanext.recipe import StageContext

if TYPE_CHECKING:
    from hildanext.core.runtime import RuntimeConfig
    from hildanext.models.card import Alignment
    from hildanext.models.loading.loaded_model import LoadedModel

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

    settings = validate(BenchConfig, section, where=context.key)
    name = settings.model if settings.model is not None else str(context.outcome("model"))
    result = _measure(settings, context, name)
    path = context.room / "bench.json"
    write_atomically(path, json.dumps({"model": name, **result}, indent=2) + "\n")
    return {"bench": str(path)}


def _measure(settings: BenchConfig, context: StageContext, name: str) -> dict[str, Any]:
    from hildanext.ar import Parent
    from hildanext.bench import decode_speed, train_speed
    from hildanext.core.runtime import RuntimeConfig

    # Weights are fp32 in training, whose steps autocast.
    dtype = "fp32" if settings.what == "train" else context.dtype
    runtime = RuntimeConfig(context.device, dtype, context.threads)
    opened = open_model(name, runtime, settings.alignment, settings.block_size, logger.info)
    if settings.what == "train":
        training = validate(train_speed.TrainSpeedConfig, settings.train, where=f"{context.key}.train")
        return train_speed.measure(opened.model, training, logger.info)
    usual = context.parent if settings.model is None else opened.parent_name
    beside = settings.parent if settings.parent is not None else usual
    decoding = validate(decode_speed.DecodeSpeedConfig, settings.decode, where=f"{context.key}.decode")
    parent = Parent(*opened.parent(beside)) if beside else None
    return decode_speed.measure(opened.model, parent, decoding, logger.info)


def open_model(
    name: str, runtime: "RuntimeConfig", alignment: "Alignment", block_size: int, say: Callable[[str], None]
) -> "LoadedModel":
    """`LoadedModel.open_or_convert`; an untrained model is told of."""
    from hildanext.models.loading.loaded_model import LoadedModel

    opened = LoadedModel.open_or_convert(name, runtime, alignment, block_size)
    if opened.untrained:
        say(f"{name} is not a diffusion checkpoint: measuring it untrained, alignment {alignment}")
    return opened
