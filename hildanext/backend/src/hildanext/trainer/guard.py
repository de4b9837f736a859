"""Stop a run that has gone wrong, before it overwrites what was good."""

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from pydantic import Field

from hildanext.core.config import config
from hildanext.core.errors import TrainingStopped

GO_ON = (
    "the last good state is kept; to go on from it with a lower learning rate or a smaller clip, set that, delete the "
    "run's run.json and run again"
)


@config
class GuardConfig:
    """A step is a spike when its loss exceeds `spike_factor` times the median of the last `window` ones."""

    spike_factor: float = Field(default=4.0, gt=1)
    patience: int = Field(default=20, ge=1)
    """So many spikes in a row stop the run; a lone one does not."""
    window: int = Field(default=50, ge=5)


class Guard:
    """Watches loss and gradient norm. `check` raises `TrainingStopped`; the caller keeps the last good checkpoint."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.window)
        self.spikes = 0
        self.block_size: int | None = None

    @property
    def calm(self) -> bool:
        """Whether the last step was no spike; only then are the weights worth saving."""
        return self.spikes == 0

    def check(self, step: int, block_size: int, loss: float, gradient_norm: float, spikes: bool = True) -> None:
        """Judge a step before the optimiser applies it. Without `spikes` no loss is too large, if it is a number."""
        for name, value in (("loss", loss), ("gradient norm", gradient_norm)):
            if not math.isfinite(value):
                raise TrainingStopped(f"{name} is {value} at step {step}", GO_ON)
        if not spikes:
            return
        if block_size != self.block_size:
            self._forget(block_size)
        usual = median(self.losses) if len(self.losses) >= 5 else math.inf
        if loss <= self.config.spike_factor * usual:
            self.spikes = 0
            self.losses.append(loss)
            return
        self.spikes += 1  # its loss is not a usual one: let in, it would raise the median until nothing is a spike
        if self.spikes >= self.config.patience:
            raise TrainingStopped(
                f"the loss is above {self.config.spike_factor} x its median for {self.spikes} steps (now {loss:.3f})",
                GO_ON,
            )

    def _forget(self, block_size: int) -> None:
        """A new block size has a new usual loss."""
        self.block_size = block_size
        self.losses.clear()
        self.spikes = 0

    def state(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "spikes": self.spikes, "block_size": self.block_size}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.losses.extend(state["losses"])
        self.spikes = int(state["spikes"])
        self.block_size = state.get("block_size")
