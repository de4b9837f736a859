"""Metrics as JSON lines: where they lie, how they are written, how they are read."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from hildanext.core.errors import CheckpointError
from hildanext.core.json_text import BadJson, parse

METRICS = "metrics.jsonl"
"""The file in a training run's or a stage's folder that holds what was measured, a line at a time."""


class MetricLog:
    """Appends one JSON object per line, flushed line by line, so that a killed run keeps what it measured.

    A half-written last line, as a kill leaves it, is removed on opening. `listeners` are called with each line
    after it was written.
    """

    listeners: list[Callable[[Mapping[str, Any]], None]]

    def __init__(self, path: str | Path) -> None:
        self.path, self.listeners = Path(path), []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._drop_half_line()
        self._file: IO[str] = self.path.open("a", encoding="utf-8")

    def write(self, **fields: Any) -> None:
        """Write one line, NaN and infinity as null. Raises `CheckpointError` when the disk does not take it."""
        try:
            self._file.write(to_json(fields) + "\n")
            self._file.flush()
        except OSError as problem:
            what = f"cannot write {self.path} ({problem.strerror})"
            raise CheckpointError(what, "free some space and resume") from None
        for listener in self.listeners:
            listener(fields)

    def truncate_after(self, step: int) -> None:
        """Drop every line whose `step` is greater than the given one; a resumed run writes them again."""
        self._file.flush()
        kept = [line for line in _lines(self.path) if _parsed(self.path, line).get("step", step) <= step]
        fresh = self.path.with_name(self.path.name + ".tmp")
        with fresh.open("wb") as file:
            file.writelines(line + b"\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        self._file.close()
        fresh.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _drop_half_line(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            window = 1 << 20
            start = max(0, size - window)
            file.seek(start)
            tail = file.read()
            if tail and not tail.endswith(b"\n"):
                file.truncate(start + tail.rfind(b"\n") + 1)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Every whole line of a metrics file, oldest first. A missing file is an empty list.

    Raises `CheckpointError` for a line that is no JSON object.
    """
    return [_parsed(Path(path), line) for line in _lines(Path(path))]


def run_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The metrics of a run's or a stage's folder."""
    return read_metrics(Path(folder) / METRICS)


def _lines(path: Path) -> list[bytes]:
    if not path.exists():
        return []
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]  # a line still being written has no newline yet
    return [line for line in whole.split(b"\n") if line.strip()]


def _parsed(path: Path, line: bytes) -> dict[str, Any]:
    try:
        value = parse(line, allow_nan=True, allow_duplicates=True)
    except BadJson as problem:
        raise CheckpointError(f"a line of {str(path)!r} is damaged ({problem})", "remove that line") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"a line of {str(path)!r} holds {type(value).__name__}", "remove that line")
    return value


def to_json(value: Any, indent: int | None = None) -> str:
    """The value as JSON that every reader takes: see `finite`."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def finite(value: Any) -> Any:
    """The same in JSON's own types: NaN and infinity, which it does not know, as None; scalars of torch and numpy as
    numbers (neither is imported for it), anything else as text."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return finite(value.item()) if hasattr(value, "item") else str(value)
