"""trackio: a local project, shown by `trackio show`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hildanext.core.tracking.base import Tracker

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker


class Trackio(Tracker):
    """A run of trackio's local project `hildanext`, named after the run's folder; nothing leaves the machine.

    trackio keeps its data where TRACKIO_DIR says (its own default otherwise). It cannot take lines back: steps
    that a killed run had passed after its last checkpoint stand there twice.
    """

    package = "trackio"

    def open(self, run: Path, config: Mapping[str, Any], step: int) -> "GeneralTracker":
        from accelerate.tracking import TrackioTracker

        inner = TrackioTracker(
            "hildanext",
            name=run.resolve().name,
            config=dict(config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        inner.start()
        return inner
