"""Rows of problem files: JSON lines or an array, or CSV with a header, plain or gzip. What cannot be read is an error.

A problem that is left out in silence would make two runs differ that say the same, so that every bad line is named.
"""

import csv
import zlib
from collections.abc import Iterator, Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from hildanext.core.errors import DataError
from hildanext.data.json_records import JsonRecords
from hildanext.data.sources.base import Record, Report, open_binary


class _Refusing(Report):
    """A report that makes the first bad thing an error."""

    def bad(self, kind: str, where: str) -> None:
        raise DataError(f"{_line(where)}: {kind}", "mend the line, or take it out of the file")


def read_records(path: str | tuple[str, ...]) -> Iterator[Record]:
    """Every record and where it stands. Raises `DataError` at the first that cannot be read."""
    for file in JsonRecords(path=path).files():
        if file.name.removesuffix(".gz").endswith(".csv"):
            yield from _csv_records(file)
        else:
            for record in JsonRecords(path=str(file)).records(_Refusing()):
                yield Record(record.value, _line(record.where))


def _csv_records(file: Path) -> Iterator[Record]:
    """The rows under a header, whose names are taken in small letters."""
    try:
        with open_binary(file) as stream, TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:  # type: ignore[type-var]
            reader = csv.DictReader(text, restkey="cells without a name", strict=True)
            for row in reader:
                named = {str(name).strip().lower(): cell for name, cell in row.items()}
                yield Record(named, f"{file.name} line {reader.line_num}")
    except (csv.Error, UnicodeDecodeError, OSError, EOFError, zlib.error) as problem:
        raise DataError(f"cannot read {str(file)!r} ({problem})", "give CSV with a header, in UTF-8") from None


def _line(where: str) -> str:
    """A record of JSON lines is its line."""
    name, record, number = where.rpartition(" record ")
    return f"{name} line {number}" if record and name.removesuffix(".gz").endswith(".jsonl") else where


def text_of(record: Mapping[str, Any], name: str, where: str) -> str:
    """A field that must be text with something in it. Raises `DataError`."""
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        keys = ", ".join(sorted(map(str, record)))
        raise DataError(
            f"{where} has no text {name!r} but the keys {keys:.200}", "add it, or name another set of problems"
        )
    return value


def name_of(record: Mapping[str, Any], where: str) -> str:
    """What a record calls itself, else its place."""
    for name in ("task_id", "unique_id", "id"):
        if isinstance(record.get(name), str | int):
            return str(record[name])
    return where
