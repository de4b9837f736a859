"""The table of jobs in SQLite, and what happened to them, in the order it happened.

Every change of a job's state is one transaction that names the state (and the attempt) it leaves: of two processes
that want the same change one finds nothing to change. Readers and writers do not wait for each other (WAL).
"""

import json
import re
import shutil
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from hildanext.core.errors import CheckpointError, StorageError
from hildanext.core.run_dir import disk_errors
from hildanext.jobs.base import STATES, Job, JobEvent, JobsFull, Progress, State, UnknownJob

DATABASE = "jobs.sqlite"
FORMAT = 1
NAME = re.compile(r"[0-9]{1,9}-[a-z][a-z0-9_]{0,40}")
"""An id. What does not look like one is not asked for."""
WAIT_SECONDS = 30.0
"""For another process's transaction."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, state TEXT NOT NULL,
    config TEXT NOT NULL, directory TEXT NOT NULL, created REAL NOT NULL, started REAL, ended REAL,
    attempts INTEGER NOT NULL DEFAULT 0, cancelling INTEGER NOT NULL DEFAULT 0, exit_code INTEGER, error TEXT,
    claimer INTEGER, claimer_born TEXT, pid INTEGER, born TEXT, child INTEGER, child_born TEXT, heartbeat REAL,
    progress TEXT NOT NULL DEFAULT '{}', cursors TEXT NOT NULL DEFAULT '{}', mark TEXT NOT NULL DEFAULT '',
    stalls INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS by_state ON jobs (state);
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL, time REAL NOT NULL, kind TEXT NOT NULL, data TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS by_job ON events (job, id);
CREATE TABLE IF NOT EXISTS supervisors (pid INTEGER, born TEXT, PRIMARY KEY (pid, born));
"""

Jobs = list[Job]
Events = list[JobEvent]
Processes = list[tuple[int, str | None]]
"""Number and birth."""
Rows = list[sqlite3.Row]
Event = tuple[str, Mapping[str, Any]]
"""Kind and data."""

NOBODY = {"claimer": None, "claimer_born": None, "pid": None, "born": None, "child": None, "child_born": None}
"""A row that no process works on."""


class JobStore:
    """The table of one folder, over one connection that the threads of a process share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / DATABASE
        self._lock = threading.RLock()
        with disk_errors(self.path):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            self._base = sqlite3.connect(self.path, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False)
            self.close = weakref.finalize(self, self._base.close)
            self._base.row_factory = sqlite3.Row
            self._base.execute("PRAGMA journal_mode = WAL")
        except sqlite3.DatabaseError as problem:
            raise CheckpointError(f"cannot open {str(self.path)!r} ({problem})", "use another --folder") from None
        with self.writing() as base:
            version = base.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, FORMAT):
                what = f"{str(self.path)!r} has format {version}, this version reads {FORMAT}"
                raise CheckpointError(what, "use another --folder, or a newer version")
            for statement in SCHEMA.split(";"):
                base.execute(statement)
            base.execute(f"PRAGMA user_version = {FORMAT}")

    def add(
        self, kind: str, config: Mapping[str, Any], directory: Path, waiting: int, write: Callable[[str], None]
    ) -> Job:
        """A new queued job. `write` puts its files where its id says, before anyone can see it.

        Raises `JobsFull` where `waiting` jobs are queued already, `StorageError` where it cannot be written; then
        nothing of it is left.
        """
        with ExitStack() as undo:
            with self.writing() as base:
                queued = base.execute("SELECT count(*) FROM jobs WHERE state = 'queued'").fetchone()[0]
                if queued >= waiting:
                    raise JobsFull(f"{queued} jobs wait already", "try again later, or cancel some")
                number = base.execute("SELECT coalesce(max(number), 0) FROM jobs").fetchone()[0] + 1
                while any(self.folder.glob(f"{number:04d}-*")):  # folders that a lost table or a killed submission left
                    number += 1
                name = f"{number:04d}-{kind}"
                undo.callback(shutil.rmtree, self.folder / name, ignore_errors=True)
                write(name)
                base.execute(
                    "INSERT INTO jobs (number, id, kind, state, config, directory, created) "
                    "VALUES (?, ?, ?, 'queued', ?, ?, ?)",
                    (number, name, kind, json.dumps(config), str(directory), time.time()),
                )
                _note(base, name, "state", {"state": "queued", "attempt": 0})
            undo.pop_all()
        return self.get(name)

    def get(self, name: str) -> Job:
        """Raises `UnknownJob`."""
        return self._job(self.row(name))

    def row(self, name: str) -> sqlite3.Row:
        """All columns of a job. Raises `UnknownJob`."""
        rows = self._read("SELECT * FROM jobs WHERE id = ?", (name,)) if NAME.fullmatch(name) else []
        if not rows:
            known = self._read("SELECT id FROM jobs ORDER BY number DESC LIMIT 1000")
            raise UnknownJob(name, [row["id"] for row in known])
        return rows[0]

    def rows(self, state: State) -> Rows:
        """All jobs in that state, the oldest first."""
        return self._read("SELECT * FROM jobs WHERE state = ? ORDER BY number", (state,))

    def list(self, limit: int, before: str | None, state: str | None) -> Jobs:
        """The newest first. Raises `UnknownJob` for a `before` that is none."""
        below = self.row(before)["number"] if before is not None else 2**62
        states: Sequence[str] = STATES if state is None else (state,)
        places = ", ".join("?" * len(states))
        rows = self._read(
            f"SELECT * FROM jobs WHERE number < ? AND state IN ({places}) ORDER BY number DESC LIMIT ?",
            (below, *states, limit),
        )
        return [self._job(row) for row in rows]

    def counts(self) -> dict[State, int]:
        """How many jobs are in each state."""
        counts = {
            row["state"]: row["count"] for row in self._read("SELECT state, count(*) AS count FROM jobs GROUP BY state")
        }
        return {state: counts.get(state, 0) for state in STATES}

    def claim(self, limit: int, claimer: int, born: str | None) -> sqlite3.Row | None:
        """Make the oldest queued job a running one, unless `limit` jobs run. None where there is nothing to do."""
        with self.writing() as base:
            running = base.execute("SELECT count(*) FROM jobs WHERE state = 'running'").fetchone()[0]
            row = base.execute("SELECT * FROM jobs WHERE state = 'queued' ORDER BY number LIMIT 1").fetchone()
            if row is None or running >= limit:
                return None
            fields = {**NOBODY, "claimer": claimer, "claimer_born": born, "started": time.time()}
            fields |= {"attempts": row["attempts"] + 1, "heartbeat": None, "exit_code": None, "error": None}
            _move(base, row["id"], ("queued",), "running", fields)
        return self.row(row["id"])

    def register(self, name: str, attempt: int, pid: int, born: str | None) -> bool:
        """A worker says that it is the one of this attempt. False: another is, or the attempt is over."""
        with self.writing() as base:
            done = base.execute(
                "UPDATE jobs SET pid = ?, born = ?, heartbeat = ? "
                "WHERE id = ? AND attempts = ? AND state = 'running' AND pid IS NULL",
                (pid, born, time.time(), name, attempt),
            )
            return done.rowcount == 1

    def update(self, name: str, attempt: int, events: Iterable[Event] = (), **fields: Any) -> bool:
        """Set columns of a running job and add events. False, and nothing done, where that attempt is over."""
        with self.writing() as base:
            names = ", ".join(f"{field} = ?" for field in fields)
            done = base.execute(
                f"UPDATE jobs SET {names} WHERE id = ? AND attempts = ? AND state = 'running'",
                (*fields.values(), name, attempt),
            )
            if done.rowcount != 1:
                return False
            for kind, data in events:
                _note(base, name, kind, data)
        return True

    def move(self, row: sqlite3.Row, to: State, **fields: Any) -> bool:
        """Change the state of a job that still is as `row` says (state, attempt, worker). False where it is not."""
        with self.writing() as base:
            now = base.execute("SELECT * FROM jobs WHERE id = ?", (row["id"],)).fetchone()
            if any(now[name] != row[name] for name in ("state", "attempts", "pid", "cancelling")):
                return False
            return _move(base, row["id"], (row["state"],), to, fields)

    def ask_to_cancel(self, name: str) -> Job:
        """A waiting job is cancelled at once, of a running one it is noted. Others stay as they are.

        Raises `UnknownJob`.
        """
        self.row(name)
        with self.writing() as base:
            if not _move(base, name, ("queued", "interrupted"), "cancelled", {"ended": time.time()}):
                done = base.execute(
                    "UPDATE jobs SET cancelling = 1 WHERE id = ? AND state = 'running' AND cancelling = 0", (name,)
                )
                if done.rowcount:
                    attempt = base.execute("SELECT attempts FROM jobs WHERE id = ?", (name,)).fetchone()[0]
                    _note(base, name, "state", {"state": "running", "attempt": attempt, "cancelling": True})
        return self.get(name)

    def events(self, name: str, after: int, limit: int) -> Events:
        """The oldest first. Raises `UnknownJob`."""
        self.row(name)
        rows = self._read("SELECT * FROM events WHERE job = ? AND id > ? ORDER BY id LIMIT ?", (name, after, limit))
        return [JobEvent(row["id"], row["job"], row["time"], row["kind"], json.loads(row["data"])) for row in rows]

    def register_supervisor(self, pid: int, born: str | None) -> None:
        """Note that this process supervises."""
        with self.writing() as base:
            base.execute("INSERT OR IGNORE INTO supervisors VALUES (?, ?)", (pid, born))

    def unregister_supervisor(self, pid: int, born: str | None) -> None:
        with self.writing() as base:
            base.execute("DELETE FROM supervisors WHERE pid = ? AND born IS ?", (pid, born))

    def supervisors(self) -> Processes:
        """Those that enlisted and did not say goodbye; they may be dead."""
        return [(row["pid"], row["born"]) for row in self._read("SELECT * FROM supervisors")]

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that no other writer shares. Raises `StorageError` where the disk is full or read-only."""
        with self._lock:
            try:
                self._base.execute("BEGIN IMMEDIATE")
                try:
                    yield self._base
                    self._base.execute("COMMIT")
                finally:
                    if self._base.in_transaction:
                        self._base.execute("ROLLBACK")
            except sqlite3.DatabaseError as problem:
                what = f"cannot write {str(self.path)!r} ({problem})"
                raise StorageError(what, "free some space, or use another --folder") from None

    def _read(self, query: str, values: Sequence[Any] = ()) -> Rows:
        with self._lock:
            try:
                return self._base.execute(query, values).fetchall()
            except sqlite3.DatabaseError as problem:
                what = f"cannot read {str(self.path)!r} ({problem})"
                raise StorageError(what, "try again, or use another --folder") from None

    def _job(self, row: sqlite3.Row) -> Job:
        """The part of a row that others see."""
        running = row["state"] == "running"
        plain = ("id", "kind", "state", "created", "started", "ended", "attempts", "exit_code", "error")
        return Job(
            **{name: row[name] for name in plain},
            pid=row["pid"] if running else None,
            heartbeat=row["heartbeat"] if running else None,
            config=json.loads(row["config"]),
            folder=self.folder / row["id"],
            cancelling=bool(row["cancelling"]) and running,
            progress=Progress(**json.loads(row["progress"])),
        )


def _move(base: sqlite3.Connection, name: str, leaving: Sequence[State], to: State, fields: Mapping[str, Any]) -> bool:
    sets = ", ".join(f"{field} = ?" for field in ("state", *fields))
    places = ", ".join("?" * len(leaving))
    done = base.execute(
        f"UPDATE jobs SET {sets} WHERE id = ? AND state IN ({places})",
        (to, *fields.values(), name, *leaving),
    )
    if done.rowcount == 0:
        return False
    row = base.execute("SELECT attempts, error, exit_code FROM jobs WHERE id = ?", (name,)).fetchone()
    ends = to not in ("queued", "running")
    ending = {key: row[key] for key in ("error", "exit_code") if ends and row[key] is not None}
    _note(base, name, "state", {"state": to, "attempt": row["attempts"], **ending})
    return True


def _note(base: sqlite3.Connection, name: str, kind: str, data: Mapping[str, Any]) -> None:
    base.execute(
        "INSERT INTO events (job, time, kind, data) VALUES (?, ?, ?, ?)", (name, time.time(), kind, json.dumps(data))
    )
