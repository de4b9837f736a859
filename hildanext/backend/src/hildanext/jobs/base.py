"""What a job is, what happens to it, and what can be wrong with asking for one.

queued -> running -> succeeded | failed | cancelled
                  -> interrupted -> queued (to go on from its checkpoint), or failed after too many in vain
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from hildanext.core.errors import HildaError

State = Literal["queued", "running", "succeeded", "failed", "cancelled", "interrupted"]
STATES: tuple[State, ...] = ("queued", "running", "succeeded", "failed", "cancelled", "interrupted")
ENDED: frozenset[State] = frozenset({"succeeded", "failed", "cancelled"})
"""States that nothing leaves."""

EventKind = Literal["state", "progress", "log", "metric"]

JOB_FILE = "job.json"
"""The job's recipe, in its folder."""
LOG_FILE = "job.log"
"""What its process printed, in its folder."""


class UnknownJob(HildaError):
    """No job has that id."""

    status = 404

    def __init__(self, name: str, known: Iterable[str]) -> None:
        close = get_close_matches(name, list(known), n=3, cutoff=0.4)
        guess = f"did you mean {', '.join(close)}?" if close else "hildanext jobs list shows what there is"
        super().__init__(f"no job {name[:80]!r}", guess)


class JobConflict(HildaError):
    """The job is not in a state in which that can be done."""

    status = 409


class JobsFull(HildaError):
    """As many jobs wait as may. `retry_after` says when to try again, in seconds."""

    status = 503

    def __init__(self, message: str, hint: str = "", retry_after: float = 30.0) -> None:
        super().__init__(message, hint)
        self.retry_after = retry_after


class ArtefactError(HildaError):
    """No file of that name is in the job's folder."""

    status = 404


@dataclass(frozen=True)
class Progress:
    """How far a job is. What is not known is None."""

    stage: str | None = None
    """Key of the stage that runs, or of the last one that did."""
    stages_done: int = 0
    stages: int = 1
    step: int | None = None
    """Optimiser steps of a training stage."""
    done: int | None = None
    """Tokens of a training stage, answers of a generating one: `unit` says which."""
    total: int | None = None
    unit: str | None = None
    loss: float | None = None
    reward: float | None = None
    """Of an alignment: the mean of its last round."""
    eta_seconds: float | None = None

    def as_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass(frozen=True)
class Job:
    """One row of the table. Times are seconds since 1970 (UTC)."""

    id: str
    kind: str
    state: State
    config: Mapping[str, Any]
    """As it was submitted."""
    folder: Path
    created: float
    started: float | None = None
    """Of the latest attempt."""
    ended: float | None = None
    attempts: int = 0
    cancelling: bool = False
    """Someone asked it to stop, and it has not yet."""
    exit_code: int | None = None
    error: str | None = None
    """One line: why it failed, or how it was last interrupted."""
    pid: int | None = None
    """Of its worker, while it runs."""
    heartbeat: float | None = None
    """When its worker last gave a sign of life."""
    progress: Progress = field(default_factory=Progress)

    @property
    def over(self) -> bool:
        return self.state in ENDED

    def as_json(self) -> dict[str, Any]:
        """All of it in JSON types; times as ISO 8601 in UTC, the folder as text."""
        record = dict(self.__dict__)
        for name in ("created", "started", "ended", "heartbeat"):
            record[name] = iso(record[name])
        return {**record, "config": dict(self.config), "folder": str(self.folder), "progress": self.progress.as_json()}


@dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job. Ids grow from event to event, over all jobs of a folder.

    `data` by kind -- state: {state, attempt, error, exit_code, cancelling}; progress: `Progress.as_json()`;
    log: {line}; metric: a line of the stage's `metrics.jsonl`, and `stage`.
    """

    id: int
    job: str
    time: float
    kind: EventKind
    data: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        return {"id": self.id, "job": self.job, "time": iso(self.time), "kind": self.kind, "data": dict(self.data)}


@dataclass(frozen=True)
class Artefact:
    """A file in a job's folder."""

    path: str
    """Relative to the folder, with forward slashes: the name by which it is opened."""
    size: int
    """Bytes."""
    modified: float

    def as_json(self) -> dict[str, Any]:
        return {"path": self.path, "size": self.size, "modified": iso(self.modified)}


def iso(seconds: float | None) -> str | None:
    """A time for people and programs: ISO 8601, UTC, to the millisecond."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
