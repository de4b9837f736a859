"""Where metric lines are shown beside `metrics.jsonl`. To add one: write the file, add its row, add its case."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hildanext.core.errors import ConfigError, UnknownChoice
from hildanext.core.tracking.base import Tracker, scalars
from hildanext.core.tracking.tensorboard import TensorBoard
from hildanext.core.tracking.trackio import Trackio

TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
}


def check_trackers(names: Sequence[str]) -> None:
    """Raises `ConfigError` for an unknown tracker, and for one whose package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise UnknownChoice("tracker", name, TRACKERS)
        package = TRACKERS[name].package
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"the tracker {name!r} needs the package {package}", f"pip install {package}")


def open_trackers(names: Sequence[str], run: Path, config: Mapping[str, Any], step: int) -> list[Tracker]:
    """One tracker for each name. Raises as `check_trackers` does."""
    check_trackers(names)
    return [TRACKERS[name](run, config, step) for name in names]


__all__ = ["TRACKERS", "Tracker", "check_trackers", "open_trackers", "scalars"]
