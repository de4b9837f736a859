"""What a tracker is: somewhere that a run's metric lines are shown as well. The JSON lines stay the record.

Accelerate's trackers do the writing. A row opens one, since only it knows how steps are taken back after a resume:
Accelerate's by themselves go on writing, and steps that a killed run wrote past its checkpoint stand there twice.
"""

from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker


class Tracker:
    """Receives every metric line of a run after it was written to `metrics.jsonl`.

    `run` is the run's folder, `config` what `run.json` records, `step` the last step of a resumed run (0 for a
    new one): lines after it are written again.
    """

    package: str
    """What has to be installed for it."""

    def __init__(self, run: Path, config: Mapping[str, Any], step: int) -> None:
        self.inner = self.open(run, config, step)

    def open(self, run: Path, config: Mapping[str, Any], step: int) -> "GeneralTracker":
        """Accelerate's tracker, started, whose steps after `step` are gone where its package can do that."""
        raise NotImplementedError

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show the numbers of one metric line."""
        self.inner.log(dict(values), step=step)

    def close(self) -> None:
        """Write what is still held back."""
        self.inner.finish()


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
