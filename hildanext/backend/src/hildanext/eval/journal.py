"""The samples of one task and one model, a line each, written as soon as they are judged; and what they belong to.

Killed at any instant, a run loses the answers that were being written and nothing else. The file beside the samples
says what made them; a run with other settings is refused rather than mixed in.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from hildanext.core.errors import ConfigError
from hildanext.core.json_text import BadJson, as_read_back, parse
from hildanext.core.metrics_log import MetricLog, read_metrics
from hildanext.core.run_dir import write_atomically

Sample = dict[str, Any]


class Journal:
    """Samples of a task and a model. `identity` is what must be the same when a run goes on.

    `session` is what may differ between the sessions of a run (threads, batch size); it is kept for the record.
    Raises `ConfigError` where the folder holds samples of another identity.
    """

    def __init__(
        self, folder: Path, task: str, model: str, identity: Mapping[str, Any], session: Mapping[str, Any]
    ) -> None:
        stem = f"{_slug(task)}--{_slug(model)}"
        self.path, head = folder / f"{stem}.jsonl", folder / f"{stem}.json"
        identity = as_read_back(identity, default=str)
        if head.is_file():
            record = _read(head)
            _refuse_other(record["identity"], identity, str(self.path))
        else:
            record = {"task": task, "way": model, "identity": identity, "sessions": []}
        if session not in record["sessions"]:
            record["sessions"].append(dict(session))
        write_atomically(head, json.dumps(record, indent=2) + "\n")
        self.sessions: list[dict[str, Any]] = record["sessions"]
        self._log = MetricLog(self.path)
        self.samples: dict[tuple[int, int], Sample] = {
            (sample["index"], sample["repeat"]): sample for sample in read_metrics(self.path)
        }

    def add(self, sample: Sample) -> None:
        """Keep a sample. Raises `CheckpointError` when the disk does not take it."""
        self._log.write(**sample)
        self.samples[sample["index"], sample["repeat"]] = sample

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.close()


def _read(head: Path) -> dict[str, Any]:
    try:
        record = parse(head.read_bytes(), allow_nan=True)
    except BadJson as problem:
        record = problem
    if not isinstance(record, dict) or not {"identity", "sessions"} <= set(record):
        raise ConfigError(f"{str(head)!r} is damaged", "remove it and the samples beside it, or give another --out")
    return record


def _refuse_other(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    flat_before, flat_now = _flat(before), _flat(now)
    changed = [key for key in sorted({*flat_before, *flat_now}) if flat_before.get(key) != flat_now.get(key)]
    if changed:
        shown = "; ".join(f"{key} was {flat_before.get(key)!r}, is {flat_now.get(key)!r}" for key in changed[:3])
        raise ConfigError(
            f"{where!r} holds samples of another configuration ({shown})",
            "give another --out, or remove that file and the .json beside it",
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix.rstrip("."): value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.")
    return flat


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()
