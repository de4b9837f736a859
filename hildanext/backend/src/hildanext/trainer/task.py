"""What a stage hands to the supervised loop."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hildanext.corruption.schedules import BlockPhase
from hildanext.diffusion import NoisedBatch
from hildanext.losses import SupervisedStep


@dataclass
class TrainingTask:
    """What a stage brings to the loop."""

    total_tokens: int
    block_phase: Callable[[int], BlockPhase]
    """Tokens seen (positions, see `train`) -> phase and block size."""
    views: Callable[[int, BlockPhase], list[NoisedBatch]]
    """Global micro-batch index -> its noised views (two for a complementary pair)."""
    validate: Callable[[SupervisedStep, int], dict[str, Any]] | None = None
    teacher: Callable[[NoisedBatch], Tensor] | None = None
    turns: int = 1
    seed: int = 0
    on_evaluation: Callable[[int, dict[str, Any]], None] | None = None
    """Called by the main process after each validation, for instance to keep the best weights."""
    samples: Callable[[int], list[dict[str, Any]]] | None = None
    """Called by the main process after that; what it returns is shown, and logged line by line as kind "sample"."""
    finished: Callable[[], bool] | None = None
    """Asked at the start and after each validation: true in the main process, it ends the training (early stopping)."""
    on_saved: Callable[[], None] | None = None
    """Called by the main process once the state is saved: only now may go what the state before it named."""
    pad_id: int | None = None
    """What fills the last block of a document, if anything does."""
    counters: dict[str, Any] = field(default_factory=dict)
    """The stage's own state; saved and restored with the run."""
