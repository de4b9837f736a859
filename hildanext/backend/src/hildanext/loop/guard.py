"""Stop a run that has gone wrong, before it overwrites what was good."""

import math
from collections import deque
from statistics import median

from pydantic import Field

from hildanext.config import knobs
from hildanext.errors import TrainingStopped


@knobs
class GuardKnobs:
    """A step is a spike when its loss exceeds `spike_factor` times the median of the last `window` ones."""

    spike_factor: float = Field(default=4.0, gt=1)
    patience: int = Field(default=20, ge=1)
    """So many spikes in a row stop the run; a lone one does not."""
    window: int = Field(default=50, ge=5)


class Guard:
    """Watches loss and gradient norm. `check` raises `TrainingStopped`; the caller keeps the last good checkpoint."""

    def __init__(self, knobs: GuardKnobs) -> None:
        self.knobs = knobs
        self.losses: deque[float] = deque(maxlen=knobs.window)
        self.spikes = 0

    def check(self, step: int, block_size: int, loss: float, gradient_norm: float) -> None:
        """Judge a step before the optimiser applies it."""
        for name, value in (("loss", loss), ("gradient norm", gradient_norm)):
            if not math.isfinite(value):
                raise TrainingStopped(
                    f"{name} is {value} at step {step}",
                    "the last checkpoint is kept; resume with a lower learning rate or a smaller clip",
                )
        usual = median(self.losses) if len(self.losses) >= 5 else math.inf
        self.spikes = self.spikes + 1 if loss > self.knobs.spike_factor * usual else 0
        if self.spikes >= self.knobs.patience:
            raise TrainingStopped(
                f"the loss is above {self.knobs.spike_factor} x its median for {self.spikes} steps (now {loss:.3f})",
                "the last checkpoint is kept; resume with a lower learning rate",
            )
        self.losses.append(loss)

    def forget(self) -> None:
        """A new block size has a new usual loss."""
        self.losses.clear()
        self.spikes = 0

    def state(self) -> dict[str, object]:
        return {"losses": list(self.losses), "spikes": self.spikes}

    def restore(self, state: dict[str, object]) -> None:
        self.losses.extend(state["losses"])  # type: ignore[arg-type]
        self.spikes = int(state["spikes"])  # type: ignore[call-overload]
