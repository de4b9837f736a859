"""Records out of JSON files, lines or one array, plain or gzip: read one at a time, the bad ones counted by line."""

from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import ClassVar

from hildanext.core.config import config
from hildanext.core.json_text import BROKEN, NO_UTF8, BadJson, first_value
from hildanext.data.sources.base import CHUNK, Document, FileSource, Record, Report, decode, open_binary, read_record


@config
class JsonRecords(FileSource):
    """Every record of the files, whatever is in it: a record of JSON lines is its line, counted from 1."""

    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".jsonl.gz", ".json", ".json.gz")

    def parse(self, raw: bytes, where: str, report: Report) -> Document | None:
        line = decode(raw, where, report) if raw.strip() else None
        return None if line is None else Document(line, where)

    def records(self, report: Report) -> Iterator[Record]:
        """What is no JSON that is taken (`core.json_text`) is counted in the report."""
        for file in self.files():
            with open_binary(file) as stream:
                opening = stream.read(CHUNK).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
            if opening == b"[":
                yield from _array(file, self.max_line_bytes, report)
                continue
            for document in JsonRecords(path=str(file), max_line_bytes=self.max_line_bytes).documents(report=report):
                if (record := read_record(document.text, document.id, report)) is not None:
                    yield record


def _array(file: Path, limit: int, report: Report) -> Iterator[Record]:
    """The elements of a JSON array, one at a time, in memory bounded by the longest of them.

    What follows an element that is broken cannot be found again: the file ends there, which is counted.
    """
    number, whole = 0, False
    with open_binary(file) as stream, TextIOWrapper(stream, encoding="utf-8-sig") as text:  # type: ignore[type-var]
        try:
            held = text.read(CHUNK).lstrip()[1:]
            while not (held := held.lstrip(" \t\r\n,")).startswith("]"):
                problem, value = None, None
                try:
                    value, end = first_value(held, 0, allow_nan=True)
                except BadJson as found:
                    problem, end = found, len(held) if found.end is None else found.end
                    if found.end is None and (whole or end > limit):
                        report.bad(f"{BROKEN}, or longer than {limit} bytes", f"{file.name} record {number + 1}")
                        return
                if end < len(held) or whole:  # a number that ends where the text was cut may go on
                    number += 1
                    where = f"{file.name} record {number}"
                    if problem is None:
                        yield Record(value, where)
                    else:
                        report.bad(problem.kind, where)
                    held = held[end:]
                    continue
                more = text.read(max(CHUNK, len(held)))
                whole = not more
                held += more
        except UnicodeDecodeError:
            report.bad(NO_UTF8, f"{file.name} after record {number}")
