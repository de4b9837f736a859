"""The jobs of one folder: submit, look, cancel, and what became of it. See the package for the whole list."""

import json
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from hildanext.core.errors import ConfigError, UnknownChoice
from hildanext.core.run_dir import write_atomically
from hildanext.jobs import processes
from hildanext.jobs.artifacts import find_artefact, list_artefacts, tail
from hildanext.jobs.base import JOB_FILE, LOG_FILE, STATES, Artefact, Job, JobConflict, JobEvent, State
from hildanext.jobs.progress import outcomes
from hildanext.jobs.store import Events, Jobs, JobStore
from hildanext.jobs.supervisor import Supervisor

WHOLE = "run"
"""The kind whose configuration has its own stages."""
LARGEST_CONFIG = 1 << 20
"""Characters of JSON."""
FOLLOW_SECONDS = 0.3

Artefacts = list[Artefact]
Names = list[str]


class JobService:
    """The jobs of one folder.

    `kinds` are the stages that may be submitted, each alone; `run` takes a whole recipe. `check` is given the recipe
    and raises a `HildaError` where it does not hold. `command` is run with the path of the recipe as its last argument;
    `limit` jobs run at a time, and `waiting` may wait.
    """

    def __init__(
        self,
        folder: str | Path,
        kinds: Collection[str],
        check: Callable[[dict[str, Any]], object],
        command: Sequence[str],
        limit: int = 1,
        waiting: int = 1000,
        resumes: int = 5,
        grace_seconds: float = 30.0,
    ) -> None:
        self.folder = Path(folder).resolve()
        self.kinds, self.check, self.waiting = kinds, check, waiting
        self.store = JobStore(self.folder)
        self.supervisor = Supervisor(self.store, command, limit, resumes, grace_seconds)

    def start(self) -> None:
        """Take jobs, in a thread, until `stop`."""
        self.supervisor.start()

    def stop(self) -> None:
        """Take no more. Workers go on, and whoever starts on this folder next watches them."""
        self.supervisor.stop()

    def close(self) -> None:
        """Stop, and let go of the table."""
        self.stop()
        self.store.close()

    def submit(self, kind: str, config: Mapping[str, Any]) -> Job:
        """Check and queue a stage with its sections, or a whole recipe (kind `run`).

        Raises `UnknownChoice` and `ConfigError` for what makes no sense, `JobsFull` where too many wait.
        """
        recipe = self.recipe(kind, config)
        self.check({**recipe, "folder": str(self.folder / "new")})

        def write(name: str) -> None:
            folder = self.folder / name
            whole = {"name": name, **recipe, "folder": str(folder)}
            write_atomically(folder / JOB_FILE, json.dumps(whole, indent=2, allow_nan=False) + "\n")

        return self.store.add(kind, config, Path.cwd(), self.waiting, write)

    def recipe(self, kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe of a submission, without its folder, which is the job's own whatever `config` says."""
        if kind not in self._choices():
            raise UnknownChoice("kind of job", kind[:80], self._choices())
        try:
            text = json.dumps(config, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as problem:
            raise ConfigError(f"the configuration is no JSON ({problem})", "use JSON types, finite numbers") from None
        if not isinstance(config, Mapping) or len(text) > LARGEST_CONFIG:
            raise ConfigError(
                "the configuration is no object, or too large", f"give sections, {LARGEST_CONFIG} characters at most"
            )
        recipe = {key: value for key, value in json.loads(text).items() if key != "folder"}
        if kind == WHOLE:
            return recipe
        if "stages" in recipe:
            raise ConfigError(
                f"a job of kind {kind!r} is one stage, and the configuration has stages of its own",
                f"submit it as {WHOLE!r}, or leave its stages out",
            )
        return {**recipe, "stages": [{"stage": kind}]}

    def list(self, limit: int = 50, before: str | None = None, state: str | None = None) -> Jobs:
        """The newest first; `before` an id, for the next page. Raises `UnknownJob`, `UnknownChoice`, `ConfigError`."""
        if state is not None and state not in STATES:
            raise UnknownChoice("state", state, STATES)
        if not 1 <= limit <= 1000:
            raise ConfigError(f"limit {limit}", "ask for 1 to 1000 jobs")
        return self.store.list(limit, before, state)

    def counts(self) -> dict[State, int]:
        """How many jobs are in each state."""
        return self.store.counts()

    def get(self, name: str) -> Job:
        """Raises `UnknownJob`."""
        return self.store.get(name)

    def cancel(self, name: str) -> Job:
        """Cancel what waits; ask what runs to stop (its state changes when it has). Once more is no error.

        Raises `UnknownJob`, and `JobConflict` for a job that has succeeded or failed.
        """
        job = self.store.ask_to_cancel(name)
        if job.state in ("succeeded", "failed"):
            raise JobConflict(f"job {name!r} has {job.state}", "only jobs that wait or run can be cancelled")
        return job

    def events(self, name: str, after: int = 0, limit: int = 1000) -> Events:
        """What happened after the event of that id, the oldest first. Raises `UnknownJob`."""
        return self.store.events(name, min(max(after, 0), 2**62), min(max(limit, 1), 10_000))

    def follow(self, name: str, after: int = 0, stopped: threading.Event | None = None) -> Iterator[JobEvent]:
        """Events as they come, until the job has ended (or `stopped` is set). Raises `UnknownJob`."""
        while True:
            over = self.get(name).over  # asked first: what came before the end is then in the table
            events = self.events(name, after)
            for event in events:
                yield event
                after = event.id
            if (over and not events) or (stopped is not None and stopped.is_set()):
                return
            if not events:
                time.sleep(FOLLOW_SECONDS)

    def outcomes(self, name: str) -> dict[str, Any]:
        """What the job's finished stages returned, by key. Raises `UnknownJob`."""
        return outcomes(self.get(name).folder)

    def log(self, name: str, size: int = 1 << 16) -> str:
        """The last `size` bytes of what its process printed. Raises `UnknownJob`."""
        return tail(self.get(name).folder / LOG_FILE, size)

    def artefacts(self, name: str) -> Artefacts:
        """The files in its folder. Raises `UnknownJob`."""
        return list_artefacts(self.get(name).folder)

    def artefact(self, name: str, path: str) -> Path:
        """A file in its folder. Raises `UnknownJob`, and `ArtefactError` for any other name."""
        return find_artefact(self.get(name).folder, path)

    def supervised(self) -> bool:
        """Whether a process, this or another, takes jobs from this folder."""
        return any(processes.alive(pid, born) for pid, born in self.store.supervisors())

    def _choices(self) -> Names:
        return [WHOLE, *self.kinds]

    def __enter__(self) -> "JobService":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
