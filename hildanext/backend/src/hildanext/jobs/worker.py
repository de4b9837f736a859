"""The process beside a job: starts its command, keeps the table informed, passes a cancellation on, notes the end.

python -m hildanext.jobs.worker FOLDER ID ATTEMPT SECONDS COMMAND...

It needs no supervisor while it runs: one that is killed finds the job as it is when it comes back. The command is
given the path of the job's file as its last argument, and runs in this process's group.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from hildanext.core.errors import CheckpointError
from hildanext.core.json_text import as_read_back
from hildanext.jobs import processes
from hildanext.jobs.base import JOB_FILE, LOG_FILE, State
from hildanext.jobs.progress import last_words, look
from hildanext.jobs.store import JobStore

LOOK_SECONDS = 0.5
HEARTBEAT_SECONDS = 5.0
INTERRUPTED = 130
"""What the command line returns after a signal, with everything saved."""
STOPPED_BY = {"SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"}
"""Signals that say nothing against the job: it can go on."""
KEEP_TRYING_SECONDS = 600.0
"""To note the end, where the disk is full."""


class Worker:
    """One attempt at one job. `grace` seconds lie between SIGINT and SIGTERM, and between that and SIGKILL."""

    def __init__(self, store: JobStore, name: str, attempt: int, grace: float, command: Sequence[str]) -> None:
        self.store, self.name, self.attempt, self.grace = store, name, attempt, grace
        self.folder = store.folder / name
        self.command = [*command, str((self.folder / JOB_FILE).resolve())]
        self.cursors: dict[str, dict[str, Any]] = {}
        self.progress = ""
        self.child: dict[str, Any] = {}
        self.last_heartbeat = -HEARTBEAT_SECONDS
        self.stopping: float | None = None
        self.asked = 0

    def run(self) -> bool:
        """Do the attempt. False where it was another's."""
        if not self.store.register(self.name, self.attempt, os.getpid(), processes.birth(os.getpid())):
            return False
        row = self.store.row(self.name)
        self.cursors, self.progress = json.loads(row["cursors"]), row["progress"]
        with (self.folder / LOG_FILE).open("ab") as log:
            try:
                child = subprocess.Popen(
                    self.command, cwd=row["directory"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            except OSError as problem:
                self._end("failed", None, f"its command could not be started ({problem})")
                return True
        self.child = {"child": child.pid, "child_born": processes.birth(child.pid)}
        self._finish(self._watch(child))
        return True

    def _watch(self, child: "subprocess.Popen[bytes]") -> int:
        """Wait for the end. Raises `SystemExit`, all others of the group killed, where the attempt is over already."""
        while True:
            try:
                ours, cancelling = self._tell(), bool(self.store.row(self.name)["cancelling"])
            except CheckpointError as problem:  # the job itself may go on
                print(f"jobs: {problem}", file=sys.stderr, flush=True)
            else:
                if not ours:
                    processes.end_others()
                    child.kill()
                    raise SystemExit(1)
                if cancelling:
                    self._stop(child)
            try:
                return child.wait(LOOK_SECONDS)
            except subprocess.TimeoutExpired:
                continue

    def _tell(self) -> bool:
        """Bring events, progress and heartbeat up to date. False where the attempt is over in the table."""
        cursors = as_read_back(self.cursors)
        events, progress_now = look(self.folder, cursors)
        progress = json.dumps(progress_now.as_json())
        if progress != self.progress:
            events.append(("progress", progress_now.as_json()))
        elif not events and time.monotonic() - self.last_heartbeat < HEARTBEAT_SECONDS:
            return True
        fields = {"heartbeat": time.time(), "progress": progress, "cursors": json.dumps(cursors), **self.child}
        ours = self.store.update(self.name, self.attempt, events, **fields)
        self.cursors, self.progress, self.last_heartbeat = cursors, progress, time.monotonic()
        return ours

    def _stop(self, child: "subprocess.Popen[bytes]") -> None:
        """Ask for an end: SIGINT, after which a training finishes its step and saves; SIGTERM; SIGKILL."""
        now = time.monotonic()
        self.stopping = self.stopping if self.stopping is not None else now
        due = 1 + int((now - self.stopping) // self.grace) if self.grace > 0 else 3
        while self.asked < min(due, 3):
            self.asked += 1
            if self.asked == 3:
                child.kill()
            else:
                processes.ask_to_stop(os.getpid(), harder=self.asked == 2)

    def _finish(self, code: int) -> None:
        """Note how it ended, in the state that follows from the code."""
        name = signal.Signals(-code).name if -code in set(signal.Signals) else ""
        if code == 0:
            self._end("succeeded", code, None)
        elif code == INTERRUPTED or name in STOPPED_BY:
            self._end("interrupted", code, f"its process was ended by {name or 'a signal'}")
        else:
            words = f"{name}: {last_words(self.folder)}" if name else last_words(self.folder)
            self._end("failed", code, words)

    def _end(self, state: State, code: int | None, error: str | None) -> None:
        """The last events, then the state. What the command left running is ended before another attempt may begin."""
        processes.end_others()
        until = time.monotonic() + KEEP_TRYING_SECONDS
        while not self._ended(state, code, error):
            if time.monotonic() > until:
                raise SystemExit(1)
            time.sleep(LOOK_SECONDS)

    def _ended(self, state: State, code: int | None, error: str | None) -> bool:
        """Note the end, cancelled where someone asked for it. False where that has to be tried again."""
        try:
            before = None
            while before != self.cursors:  # a look reads so much and no more
                before = self.cursors
                self._tell()
            row = self.store.row(self.name)
            if row["state"] != "running" or row["attempts"] != self.attempt:
                return True
            if row["cancelling"]:
                state, error = "cancelled", None
            ended = None if state == "interrupted" else time.time()
            return self.store.move(row, state, exit_code=code, error=error, ended=ended)
        except CheckpointError as problem:
            print(f"jobs: {problem}", file=sys.stderr, flush=True)
            return False


def main(arguments: Sequence[str]) -> int:
    """One attempt. The worker itself takes no notice of the signals that its group is sent."""

    def ignore(number: int, frame: FrameType | None) -> None:
        return None  # not SIG_IGN, which the command would inherit

    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), ignore)
    folder, job, attempt, grace, *command = arguments
    store = JobStore(Path(folder))
    try:
        return 0 if Worker(store, job, int(attempt), float(grace), command).run() else 1
    finally:
        store.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
