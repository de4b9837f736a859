"""trackio: a local project, shown by `trackio show`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hildanext.core.tracking.base import Tracker


class Trackio(Tracker):
    """A run of trackio's local project `hildanext`, named after the run's folder; nothing leaves the machine.

    trackio keeps its data where TRACKIO_DIR says (its own default otherwise). It cannot take lines back: steps
    that a killed run had passed after its last checkpoint stand there twice.
    """

    package = "trackio"

    def __init__(self, run: Path, config: Mapping[str, Any], step: int) -> None:
        import trackio

        self.run = trackio.init(
            project="hildanext",
            name=run.resolve().name,
            config=dict(config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()
