"""How far a job is, read from what its run writes: the markers of stages, metric lines, the log.

A run's files are its own; this only reads them. Where reading stopped is kept as cursors (plain JSON) by the caller,
so that another process goes on there.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hildanext.core.json_text import BadJson, parse
from hildanext.core.metrics_log import METRICS
from hildanext.jobs.artifacts import tail
from hildanext.jobs.base import JOB_FILE, LOG_FILE, Progress

MOST_BYTES = 1 << 22
"""Read of one file in one look; the rest is for the next."""
MOST_LINES = 200
"""Of the log in one look; what a flood leaves out is in the file."""
LONGEST_LINE = 2000
LONGEST_METRIC = 20_000

Cursors = dict[str, dict[str, Any]]
Found = list[tuple[str, dict[str, Any]]]
"""Kind and data of events."""


def look(folder: Path, cursors: Cursors) -> tuple[Found, Progress]:
    """What is new since the cursors, which are moved on, and how far the job is now."""
    events = _log_lines(folder, cursors)
    for path in sorted(folder.glob(f"*/{METRICS}")):
        events += _metric_lines(path, cursors)
    return events, _progress(folder, cursors)


def progress_mark(folder: Path) -> str:
    """A hash that changes when the run has kept something: a marker, a shard, a line of answers, a training state.

    What every attempt writes anew (logs, metrics, records) is left out.
    """
    again = {JOB_FILE, LOG_FILE, METRICS, "run.json"}
    marks: list[str] = []
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(place) / name
            if name in again or ".tmp" in str(path) or name.endswith(".started.json"):
                continue
            facts = path.stat() if path.exists() else None
            if facts is not None:
                when = facts.st_mtime_ns if path.parent.name == "state" else 0
                marks.append(f"{path.relative_to(folder).as_posix()} {facts.st_size} {when}")
    return hashlib.sha256("\n".join(marks).encode("utf-8", "surrogateescape")).hexdigest()


def last_words(folder: Path) -> str:
    """The line in which a failed run said why, or its last one."""
    lines = [line.strip() for line in tail(folder / LOG_FILE, 1 << 16).splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it printed nothing"])[-1][:LONGEST_LINE]


def _log_lines(folder: Path, cursors: Cursors) -> Found:
    cursor = cursors.setdefault(LOG_FILE, {"offset": 0})
    lines = [text.rstrip("\r").rsplit("\r", 1)[-1] for text in _new_lines(folder / LOG_FILE, cursor)]
    left_out = len(lines) - MOST_LINES
    if left_out > 0:
        lines = [f"... {left_out} lines are in {LOG_FILE} only ...", *lines[left_out:]]
    return [("log", {"line": line[:LONGEST_LINE]}) for line in lines]


def _metric_lines(path: Path, cursors: Cursors) -> Found:
    """New lines; of training steps, which may be many, the last. Steps that a resumed run writes again are skipped."""
    stage = path.parent.name
    cursor = cursors.setdefault(f"{stage}/{METRICS}", {"offset": 0, "file": None, "seen": {}, "last": {}})
    file = path.stat().st_ino if path.exists() else None
    if file != cursor["file"] or (path.exists() and path.stat().st_size < cursor["offset"]):
        cursor.update(file=file, offset=0)
    kept: list[dict[str, Any]] = []
    for text in _new_lines(path, cursor):
        line = _metric(text)
        kind, step = line.get("kind"), line.get("step")
        if not isinstance(kind, str):
            continue
        if kind in ("train", "progress"):
            _follow(cursor["last"], line)
        if isinstance(step, int) and kind != "sample":
            if step <= cursor["seen"].get(kind, -1):
                continue
            cursor["seen"][kind] = step
        if kind == "train" and kept and kept[-1]["kind"] == "train":
            kept.pop()
        if kind != "progress" and len(text) <= LONGEST_METRIC:
            kept.append(line)
    return [("metric", {"stage": stage, **line}) for line in kept]


def _follow(last: dict[str, Any], line: Mapping[str, Any]) -> None:
    """Keep of a line what progress is told from; the speed is smoothed over some ten lines."""
    for name in ("step", "loss", "reward", "done", "total", "unit", "eta_seconds"):
        if name in line:
            last[name] = line[name]
    unit = next((unit for unit in ("mask_positions", "step", "tokens") if f"total_{unit}" in line), "tokens")
    if unit in line:  # a training's
        last |= {"done": line[unit], "total": line.get(f"total_{unit}"), "unit": unit.replace("_", " ")}
    speed = line.get(f"{unit}_per_second")
    if isinstance(speed, int | float) and speed > 0:
        last["speed"] = 0.9 * last.get("speed", speed) + 0.1 * speed


def _progress(folder: Path, cursors: Cursors) -> Progress:
    keys = stage_keys(folder)
    done = [key for key in keys if (folder / "stages" / f"{key}.done.json").exists()]
    current = next((key for key in keys if key not in done), keys[-1] if keys else None)
    last = cursors.get(f"{current}/{METRICS}", {}).get("last", {})
    fields: dict[str, Any] = {name: last.get(name) for name in ("step", "loss", "reward")}
    if "done" in last:
        fields |= {name: last.get(name) for name in ("done", "total", "unit", "eta_seconds")}
        if last.get("total") is not None and last.get("speed"):
            fields["eta_seconds"] = round(max(last["total"] - last["done"], 0) / last["speed"], 1)
    return Progress(stage=current, stages_done=len(done), stages=max(len(keys), 1), **fields)


def stage_keys(folder: Path) -> list[str]:
    """Keys of the job's stages, in order."""
    try:
        stages = parse((folder / JOB_FILE).read_bytes())["stages"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [str(stage.get("as", stage.get("stage"))) for stage in stages]


def outcomes(folder: Path) -> dict[str, Any]:
    """What the finished stages returned, by key, in order."""
    outcomes: dict[str, Any] = {}
    for key in stage_keys(folder):
        try:
            record = parse((folder / "stages" / f"{key}.done.json").read_bytes(), allow_nan=True, allow_duplicates=True)
        except (OSError, ValueError):
            continue
        outcomes[key] = record.get("outcome")
    return outcomes


def _new_lines(path: Path, cursor: dict[str, Any]) -> Iterator[str]:
    """Whole lines beyond the cursor, which moves with them. A line without an end counts once it is very long."""
    try:
        with path.open("rb") as file:
            file.seek(cursor["offset"])
            data = file.read(MOST_BYTES)
    except OSError:  # not there yet, or being put in its place
        return
    whole = data.rfind(b"\n") + 1
    if whole == 0 and len(data) == MOST_BYTES:
        whole = len(data)
    cursor["offset"] += whole
    for line in data[:whole].split(b"\n")[: None if whole and data[whole - 1 : whole] != b"\n" else -1]:
        text = line.decode("utf-8", errors="replace")
        if text.strip():
            yield text


def _metric(text: str) -> dict[str, Any]:
    """A line's object, numbers that JSON does not know as None; {} for what is none."""
    try:
        line = parse(text, allow_nan=True, allow_duplicates=True)
    except BadJson:
        return {}
    return line if isinstance(line, dict) else {}
