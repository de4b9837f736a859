"""What a stage hands to the supervised loop: what is learned, and what happens beside it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from hildanext.core.metrics_log import MetricLog
from hildanext.corruption.schedules import BlockPhase
from hildanext.diffusion import NoisedBatch
from hildanext.trainer.window import WindowSource

Unit = Literal["tokens", "mask_positions", "step"]


@dataclass
class Callbacks:
    """What happens beside the training, in the main process alone; none of it changes a weight."""

    on_evaluation: Callable[[int, dict[str, Any]], None] | None = None
    """After each validation, with its step and numbers, for instance to keep the best weights."""
    on_saved: Callable[[], None] | None = None
    """Once the state is saved: only now may go what the state before it named."""
    samples: Callable[[int], list[dict[str, Any]]] | None = None
    """After `on_evaluation`; what it returns is shown, and logged line by line as kind "sample"."""
    finished: Callable[[], bool] | None = None
    """Asked at the start and after each validation: true ends the training (early stopping)."""
    watch: Callable[[MetricLog], None] | None = None
    """Given the run's metrics as they are when it begins or goes on, to listen to them (`MetricLog.listeners`)."""
    state: dict[str, Any] = field(default_factory=dict)
    """The callbacks' own state; saved and restored with the run."""


@dataclass
class TrainingTask:
    """What is learned: from which noised batches, at which block size, for how long, and how it is measured."""

    total: int
    """In `unit`s."""
    block_phase: Callable[[int], BlockPhase]
    """Units seen -> phase and block size."""
    views: Callable[[int, BlockPhase], list[NoisedBatch]] | None = None
    """Global micro-batch index -> its noised views (two for a complementary pair). This or `windows`."""
    windows: WindowSource | None = None
    """Where a step's views are made, not read. A step of them that has nothing to learn changes no weight."""
    validate: Callable[[Any, int], dict[str, Any]] | None = None
    """The `TrainingStep` that the stage trains, and the optimiser's step -> what was measured."""
    teacher: Callable[[NoisedBatch], Tensor] | None = None
    turns: int = 1
    unit: Unit = "tokens"
    """What the length of the run, and its schedules, are counted in: positions of documents (see `train`), masks that
    were learnt, or steps."""
    seed: int = 0
    pad_id: int | None = None
    """What fills the last block of a document, if anything does."""
    callbacks: Callbacks = field(default_factory=Callbacks)
    told: Callable[[Mapping[str, Any]], str] | None = None
    """A line of metrics -> what is shown of it; None shows what supervised losses have."""
