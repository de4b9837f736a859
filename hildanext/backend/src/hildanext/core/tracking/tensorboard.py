"""TensorBoard: event files in the run's folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hildanext.core.tracking.base import Tracker


class TensorBoard(Tracker):
    """Event files below `RUN/tensorboard`; look with `tensorboard --logdir RUN`."""

    package = "tensorboard"

    def __init__(self, run: Path, config: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = step + 1 if step else None  # what a killed run wrote past its checkpoint is not shown twice
        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=purge)
        self.writer.add_text("config", f"```json\n{json.dumps(config, indent=2, default=str)}\n```", step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()
