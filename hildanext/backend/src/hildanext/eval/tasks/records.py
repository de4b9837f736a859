"""The records of a benchmark: a file, a folder with a file per split, or a data set of the hub."""

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hildanext.core.errors import DataError
from hildanext.models.loading.names import is_hub_id

Record = Mapping[str, Any]

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz")
TROUBLES = (OSError, ValueError, EOFError, RuntimeError)
"""What the datasets library raises for a hub that is out of reach or a name that does not exist."""


def read_records(place: str, split: str, subset: str | None = None, columns: Sequence[str] = ()) -> list[Record]:
    """All records of a split. `place`: a file, a folder that holds `<split>.jsonl` (.csv, .json, .gz), or owner/name.

    `columns` name the cells of a CSV file that has no header of its own. Raises `DataError` for what cannot be had.
    """
    path = Path(place).expanduser()
    if path.is_dir():
        path = _in_folder(path, split)
    if path.is_file():
        records = _parse(path, columns)
    elif is_hub_id(place) and not path.suffix:
        records = _from_hub(place, split, subset)
    else:
        raise DataError(
            f"no benchmark data at {place!r}",
            f"give a file ({', '.join(SUFFIXES[:3])} or .csv), a folder that holds {split}.jsonl, or a hub id",
        )
    if not records:
        raise DataError(f"{place!r} holds no rows", "give a file with one example per line")
    return records


def beside(place: str, split: str) -> str:
    """Where another split of the same data is: the folder of a file, else the same folder or hub id.

    Raises `DataError` where the folder of a file holds none.
    """
    path = Path(place).expanduser()
    return str(_in_folder(path.parent, split)) if path.is_file() else place


def fingerprint(records: Sequence[Record]) -> str:
    """A hash of what the records say, wherever they came from."""
    text = "\n".join(json.dumps(record, sort_keys=True, default=str) for record in records)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def text_of(record: Record, field: str, where: str) -> str:
    """A field that must be text. Raises `DataError`."""
    value = record.get(field)
    if not isinstance(value, str):
        raise DataError(f"{where} has no text {field!r} but the keys {sorted(record)}", "give the benchmark's own rows")
    return value


def _in_folder(folder: Path, split: str) -> Path:
    for suffix in SUFFIXES:
        if (folder / f"{split}{suffix}").is_file():
            return folder / f"{split}{suffix}"
    raise DataError(f"{str(folder)!r} holds no {split}.jsonl", f"put the {split} split there, or name a file")


def _parse(path: Path, columns: Sequence[str]) -> list[Record]:
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as problem:
        raise DataError(f"cannot read {str(path)!r} ({problem})", "fetch the file again") from None
    name = path.name.removesuffix(".gz")
    if name.endswith(".csv"):
        return _csv(text, columns)
    try:
        whole = json.loads(text) if name.endswith(".json") else None
    except json.JSONDecodeError:
        whole = None  # JSON lines under the name .json
    if isinstance(whole, list):
        return [_object(record, f"{path.name} row {number + 1}") for number, record in enumerate(whole)]
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            records.append(_object(json.loads(line), f"{path.name} line {number}"))
        except json.JSONDecodeError as problem:
            raise DataError(f"{path.name} line {number}: {problem.msg}", "one JSON object per line") from None
    return records


def _object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{where} holds {type(value).__name__}", "one JSON object per line")
    return value


def _csv(text: str, columns: Sequence[str]) -> list[Record]:
    lines = [line for line in csv.reader(io.StringIO(text)) if line]
    if not lines:
        return []
    header = [cell.strip().lower() for cell in lines[0]]
    named = "question" in header or not columns
    names = header if named else list(columns)
    return [dict(zip(names, line, strict=False)) for line in lines[named:]]


def _from_hub(name: str, split: str, subset: str | None) -> list[Record]:
    try:
        import datasets
    except ModuleNotFoundError:
        raise DataError("data sets of the hub need the package 'datasets'", "pip install datasets") from None
    try:
        return [dict(record) for record in datasets.load_dataset(name, subset, split=split)]
    except TROUBLES as problem:
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:200]
        raise DataError(
            f"cannot open the data set {name!r} ({reason})",
            f"check the name and that the hub can be reached, or give a local file that holds the {split} split",
        ) from None
