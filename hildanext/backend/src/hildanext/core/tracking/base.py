"""What a tracker is: somewhere that a run's metric lines are shown as well. The JSON lines stay the record."""

from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any


class Tracker:
    """Receives every metric line of a run after it was written to `metrics.jsonl`.

    `run` is the run's folder, `config` what `run.json` records, `step` the last step of a resumed run (0 for a
    new one): lines after it are written again.
    """

    package: str
    """What has to be installed for it."""

    def __init__(self, run: Path, config: Mapping[str, Any], step: int) -> None:
        raise NotImplementedError

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show the numbers of one metric line."""
        raise NotImplementedError

    def close(self) -> None:
        """Write what is still held back."""


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a metric line under `kind/name`, nested ones as `kind/name/inner`; the rest is left out."""
    numbers: dict[str, float] = {}

    def collect(prefix: str, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, Mapping):
                collect(f"{prefix}/{name}", value)
            elif isinstance(value, Real) and not isinstance(value, bool):
                numbers[f"{prefix}/{name}"] = float(value)

    kind = str(line.get("kind", "run"))
    collect(kind, {name: value for name, value in line.items() if name not in ("kind", "step")})
    return numbers
