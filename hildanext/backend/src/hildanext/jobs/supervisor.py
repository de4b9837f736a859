"""Takes jobs from the table and keeps it true: starts workers, finds dead ones, sends interrupted jobs back.

Several supervisors may share a folder; each change is the table's, so that only one of them makes it.
"""

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from hildanext.core.errors import HildaError
from hildanext.jobs import processes
from hildanext.jobs.base import LOG_FILE, State
from hildanext.jobs.progress import progress_mark
from hildanext.jobs.store import NOBODY, JobStore

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
REGISTER_SECONDS = 120.0
"""A worker that has not said by then that it is there never will; if it does, the table refuses it."""

WORKERS: dict[tuple[str, str, int], "subprocess.Popen[bytes]"] = {}
"""Started by this process and not seen to end, by folder, job and attempt. They outlive a supervisor."""
TURNS = threading.Lock()
"""Supervisors of one process look in turns: between a claim and its worker nobody else may find that it has none."""


class Supervisor:
    """Runs at most `limit` jobs of a folder at a time, over all its supervisors.

    A job that is interrupted `resumes` times in a row without having kept anything new fails.
    """

    def __init__(self, store: JobStore, command: Sequence[str], limit: int, resumes: int, grace: float) -> None:
        self.store, self.command, self.limit, self.resumes, self.grace = store, command, limit, resumes, grace
        self.me = (os.getpid(), processes.birth(os.getpid()))
        self.complaint = ""
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Supervise in a thread of this process. A second call does nothing."""
        if self._thread is None:
            self._over.clear()
            self.store.register_supervisor(*self.me)
            self._thread = threading.Thread(target=self._work, name="jobs", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Start nothing more, and return when the thread has ended. Workers go on."""
        if self._thread is not None:
            self._over.set()
            self._thread.join()
            self._thread = None
            self.store.unregister_supervisor(*self.me)

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def tick(self) -> None:
        """One look at everything. Raises `CheckpointError` where the table cannot be written."""
        with TURNS:
            for key in [key for key, worker in WORKERS.items() if worker.poll() is not None]:
                del WORKERS[key]
            for row in self.store.rows("running"):
                self._bury(row)
            for row in self.store.rows("interrupted"):
                self._send_back(row)
            while (claimed := self.store.claim(self.limit, *self.me)) is not None:
                self._begin(claimed)

    def _work(self) -> None:
        while not self._over.is_set():
            try:
                self.tick()
                self.complaint = ""
            except (HildaError, OSError) as problem:  # a full disk may have room again
                if str(problem) != self.complaint:
                    logger.warning("jobs wait: %s", problem)
                self.complaint = str(problem)
            self._over.wait(LOOK_SECONDS)

    def _begin(self, row: Any) -> None:
        folder = self.store.folder.resolve()
        words = (str(folder), row["id"], str(row["attempts"]), str(self.grace))
        command = [sys.executable, "-m", "hildanext.jobs.worker", *words, *self.command]
        try:
            with (folder / row["id"] / LOG_FILE).open("ab") as log:
                worker = processes.begin(command, folder, log, {"PYTHONUNBUFFERED": "1"})
        except OSError as problem:
            self.store.move(row, "interrupted", error=f"its worker could not be started ({problem})", **NOBODY)
            return
        WORKERS[self._key(row)] = worker
        logger.info("%s: attempt %s", row["id"], row["attempts"])

    def _bury(self, row: Any) -> None:
        """A running job whose worker has died is interrupted, once nothing of its group is left."""
        if not self._dead(row):
            return
        if row["pid"] is not None:
            processes.end_group(row["pid"], row["born"], row["child"], row["child_born"])
        to: State = "cancelled" if row["cancelling"] else "interrupted"
        error = None if row["cancelling"] else "its worker died"
        ended = time.time() if row["cancelling"] else None
        if self.store.move(row, to, error=error, exit_code=None, ended=ended, **NOBODY):
            logger.info("%s: %s", row["id"], error if error is not None else to)

    def _dead(self, row: Any) -> bool:
        if row["pid"] is not None:
            return not processes.alive(row["pid"], row["born"])
        if (row["claimer"], row["claimer_born"]) == self.me:  # one of ours, which has not spoken yet
            return self._key(row) not in WORKERS
        late = time.time() - row["started"] > REGISTER_SECONDS
        return late or not processes.alive(row["claimer"], row["claimer_born"])

    def _key(self, row: Any) -> tuple[str, str, int]:
        return str(self.store.folder), row["id"], row["attempts"]

    def _send_back(self, row: Any) -> None:
        """An interrupted job is queued again, unless it has come to nothing too often."""
        if row["cancelling"]:
            self.store.move(row, "cancelled", error=None, ended=time.time(), **NOBODY)
            return
        mark = progress_mark(self.store.folder / row["id"])
        stalls = row["stalls"] + 1 if mark == row["mark"] else 0
        if stalls >= self.resumes:
            error = f"interrupted {stalls + 1} times without getting anywhere; at last: {row['error']}"
            self.store.move(row, "failed", error=error, ended=time.time(), **NOBODY)
        else:
            self.store.move(row, "queued", mark=mark, stalls=stalls, **NOBODY)
