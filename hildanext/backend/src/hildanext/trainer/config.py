"""How the supervised loop trains, whatever it trains on."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field

from hildanext.core.config import config
from hildanext.core.runtime import cap_allocator
from hildanext.core.tracking import check_trackers
from hildanext.corruption.input_layout import LayoutChoice
from hildanext.corruption.schedules import LearningRate, MaskNoise
from hildanext.models import HEAD_ROWS
from hildanext.trainer.guard import GuardConfig
from hildanext.trainer.optimizer import Offload, OptimizerName, check_device

MEMORY = ("gradient_checkpointing", "offload", "max_vram_fraction")
HARMLESS = ("checkpoint_every", "evaluate_every", "stop_after", "trackers", "chunk", "guard", *MEMORY)
"""Knobs of `TrainConfig` that change no step of the optimiser; a run may be resumed with others. `evaluate_every` does
decide which checkpoints a fine-tuning has to choose its best from, and when its patience ends."""


def _refuse_fp16(value: Any) -> Any:
    if value == "fp16":
        raise ValueError("fp16 gradients need a loss scaler, which this loop has not; give auto, bf16 or no (fp32)")
    return value


@config
class TrainConfig:
    """How the loop trains; what it trains on is the stage's business."""

    batch_size: int = Field(default=2, ge=1)
    """Rows of a micro-batch, per process."""
    accumulate: int = Field(default=1, ge=1)
    """Micro-batches of a step, per process."""
    learning_rate: LearningRate = LearningRate()
    mask_noise: MaskNoise = MaskNoise()
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1.0, gt=0)
    precision: Annotated[Literal["auto", "no", "bf16"], BeforeValidator(_refuse_fp16)] = "auto"
    """Autocast over fp32 weights; `auto` is bf16 where the device computes in it. GPUs of the Pascal generation have
    no bf16 and compute fp16 slower than fp32: they take "no"."""
    guard: GuardConfig = GuardConfig()
    trackers: tuple[str, ...] = ()
    """Where metrics are shown beside `metrics.jsonl`: tensorboard, trackio."""
    checkpoint_every: int = Field(default=200, ge=1)
    evaluate_every: int = Field(default=100, ge=1)
    chunk: int = Field(default=HEAD_ROWS, ge=1)
    """Rows of logits that exist at once."""
    layout: LayoutChoice = "auto"
    """`response` feeds only those copies of tokens that a prediction depends on, `double` both copies of every token;
    `auto` takes the first where it is at least a tenth shorter. Losses are the same up to rounding (adapters' dropout,
    which is drawn for each copy, is not)."""
    optimizer: OptimizerName = "adamw"
    """`adamw8bit` (bitsandbytes) keeps 2 bytes of states for each weight that learns, where `adamw` keeps 8."""
    gradient_checkpointing: bool = False
    """Keep only the input of each layer, and compute the layer again in the backward pass."""
    offload: Offload | None = None
    """`optimizer`: between steps its states lie in the computer's memory. For GPUs."""
    max_vram_fraction: float | None = Field(default=None, gt=0, le=1)
    """The most of a GPU's memory that torch may take."""
    stop_after: int | None = Field(default=None, ge=1)
    """Stop (resumable) after this many steps in total; for tests and for time limits."""


def ready_device(config: TrainConfig, device: torch.device) -> None:
    """For a stage, before it loads anything: cap the allocator and refuse (`ConfigError`) what cannot be done here."""
    check_trackers(config.trackers)
    cap_allocator(device, config.max_vram_fraction)
    check_device(config.optimizer, config.offload, device)


def comparable_train(section: Mapping[str, Any], processes: int) -> dict[str, Any]:
    """What decides the steps in a `train` section, for `trainer.state.check_resumes`: a step's micro-batches count
    over all processes."""
    kept = {name: value for name, value in section.items() if name not in (*HARMLESS, "accumulate")}
    return {**kept, "accumulate (all processes)": section["accumulate"] * processes}
