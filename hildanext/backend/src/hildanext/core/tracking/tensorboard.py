"""TensorBoard: event files in the run's folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hildanext.core.tracking.base import Tracker

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker


class TensorBoard(Tracker):
    """Event files below `RUN/tensorboard`; look with `tensorboard --logdir RUN`."""

    package = "tensorboard"

    def open(self, run: Path, config: Mapping[str, Any], step: int) -> "GeneralTracker":
        from accelerate.tracking import TensorBoardTracker

        purge = step + 1 if step else None  # what a killed run wrote past its checkpoint is not shown twice
        inner = TensorBoardTracker("tensorboard", run, purge_step=purge)
        inner.start()
        # As text: Accelerate would store it as hyperparameters, which must be flat and make a folder at every resume.
        inner.tracker.add_text("config", f"```json\n{json.dumps(config, indent=2, default=str)}\n```", step)
        return inner
