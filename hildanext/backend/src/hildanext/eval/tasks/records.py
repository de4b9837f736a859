"""The records of a benchmark: a file, a folder with a file per split, or a data set of the hub."""

import csv
import gzip
import hashlib
import io
import json
import logging
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hildanext.core.errors import DataError
from hildanext.core.json_text import BROKEN, BadJson, decode, first_value, parse
from hildanext.core.run_dir import expand_home
from hildanext.data.sources.base import Report
from hildanext.models.loading.names import is_hub_id

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz")
TROUBLES = (OSError, ValueError, EOFError, RuntimeError)
"""What the datasets library raises for a hub that is out of reach or a name that does not exist."""


class Records(list[Record]):
    """The rows of a split, and what was left out of it."""

    refused: Report


def read_records(place: str, split: str, subset: str | None = None, columns: Sequence[str] = ()) -> Records:
    """All records of a split. `place`: a file, a folder that holds `<split>.jsonl` (.csv, .json, .gz), or owner/name.

    `columns` name the cells of a CSV file that has no header of its own. A record with what JSON readers do not agree
    on (`core.json_text`) is left out, counted in `Records.refused` and told in the log. Raises `DataError` for what
    cannot be had, and for a file that is broken: a benchmark is then not what it says.
    """
    path, report = expand_home(place), Report()
    if path.is_dir():
        path = _in_folder(path, split)
    if path.is_file():
        records = _parse(path, columns, report)
    elif is_hub_id(place) and not path.suffix:
        records = _from_hub(place, split, subset)
    else:
        raise DataError(
            f"no benchmark data at {place!r}",
            f"give a file ({', '.join(SUFFIXES[:3])} or .csv), a folder that holds {split}.jsonl, or a hub id",
        )
    if not records:
        refused = f" that can be used ({report.summary()})" if report.total else ""
        raise DataError(f"{place!r} holds no rows{refused}", "give a file with one example per line")
    if report.total:
        logger.warning("%s: rows left out: %s", path, report.summary())
    found = Records(records)
    found.refused = report
    return found


def beside(place: str, split: str) -> str:
    """Where another split of the same data is: the folder of a file, else the same folder or hub id.

    Raises `DataError` where the folder of a file holds none.
    """
    path = expand_home(place)
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


def _parse(path: Path, columns: Sequence[str], report: Report) -> list[Record]:
    try:
        raw = path.read_bytes()
        text = decode(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    except (OSError, EOFError, zlib.error, BadJson) as problem:
        raise DataError(f"cannot read {str(path)!r} ({problem})", "fetch the file again") from None
    name = path.name.removesuffix(".gz")
    if name.endswith(".csv"):
        return _csv(text, columns)
    if name.endswith(".json") and text.lstrip().startswith("["):
        found = _elements(text, path.name)
    else:
        found = _lines(text, path.name)
    records = []
    for value, where in found:
        if not isinstance(value, BadJson):
            records.append(_object(value, where))
        elif value.kind == BROKEN:
            raise DataError(f"{where}: {value}", "one JSON object per line") from None
        else:
            report.bad(value.kind, where)
    return records


Found = Iterator[tuple[Any, str]]
"""A value, or what is wrong with it, and where it stands."""


def _lines(text: str, name: str) -> Found:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield parse(line, allow_nan=True), f"{name} line {number}"
            except BadJson as problem:
                yield problem, f"{name} line {number}"


def _elements(text: str, name: str) -> Found:
    """The elements of a JSON array."""
    place, number = text.index("[") + 1, 0
    while (place := _SPACE.match(text, place).end()) < len(text) and text[place] != "]":  # type: ignore[union-attr]
        number += 1
        try:
            value, place = first_value(text, place, allow_nan=True)
        except BadJson as problem:
            yield problem, f"{name} row {number}"
            if problem.end is None:
                return
            place = problem.end
        else:
            yield value, f"{name} row {number}"
    if place == len(text):
        yield BadJson(BROKEN, "the array does not end"), f"{name} after row {number}"


_SPACE = re.compile(r"[ \t\r\n,]*")


def _object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{where} holds {type(value).__name__}", "one JSON object per line")
    return value


def _csv(text: str, columns: Sequence[str]) -> list[Record]:
    try:
        lines = [line for line in csv.reader(io.StringIO(text)) if line]
    except csv.Error as problem:
        raise DataError(f"the CSV cannot be read ({problem})", "is it CSV? JSON lines end in .jsonl") from None
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
