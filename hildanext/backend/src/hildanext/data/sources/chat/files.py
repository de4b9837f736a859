"""Conversations out of files: JSON lines or one JSON array, plain or gzip."""

import json
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from hildanext.core.config import config
from hildanext.data.sources.base import CHUNK, Document, FileSource, Report, decode, open_binary
from hildanext.data.sources.chat.base import ChatSource, Record


@config
class _Lines(FileSource):
    """Lines that are not empty, as they are."""

    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".jsonl.gz", ".json", ".json.gz")

    def parse(self, raw: bytes, where: str, report: Report) -> Document | None:
        line = decode(raw, where, report) if raw.strip() else None
        return None if line is None else Document(line, where)


@config
class ChatFiles(ChatSource):
    """A file, a folder (searched in depth), a pattern, or a list of these."""

    path: str | tuple[str, ...]
    max_line_bytes: int = Field(default=8 << 20, ge=16)
    """A longer record is counted and skipped; it bounds the memory whatever the input."""

    def records(self, report: Report) -> Iterator[Record]:
        for file in self._lines(self.path).files():
            with open_binary(file) as stream:
                opening = stream.read(CHUNK).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
            if opening == b"[":
                yield from _array(file, self.max_line_bytes, report)
                continue
            for document in self._lines(str(file)).documents(report=report):
                try:
                    yield Record(json.loads(document.text), document.id)
                except (json.JSONDecodeError, RecursionError):
                    report.bad("broken JSON", document.id)

    def fingerprint(self) -> list[Any]:
        return self._lines(self.path).fingerprint()

    def _lines(self, path: str | tuple[str, ...]) -> _Lines:
        return _Lines(path=path, max_line_bytes=self.max_line_bytes)


def _array(file: Path, limit: int, report: Report) -> Iterator[Record]:
    """The elements of a JSON array, one at a time, in memory bounded by the longest of them.

    What follows an element that cannot be read cannot be found again: the file ends there, which is counted.
    """
    decoder, number, whole = json.JSONDecoder(), 0, False
    with open_binary(file) as stream, TextIOWrapper(stream, encoding="utf-8-sig") as text:  # type: ignore[type-var]
        try:
            held = text.read(CHUNK).lstrip()[1:]
            while not (held := held.lstrip(" \t\r\n,")).startswith("]"):
                try:
                    value, end = decoder.raw_decode(held)
                except json.JSONDecodeError:
                    end = len(held)
                    if whole or end > limit:
                        report.bad(f"broken JSON, or longer than {limit} bytes", f"{file.name} record {number + 1}")
                        return
                if end < len(held) or whole:  # a number that ends where the text was cut may go on
                    number += 1
                    yield Record(value, f"{file.name} record {number}")
                    held = held[end:]
                    continue
                more = text.read(max(CHUNK, len(held)))
                whole = not more
                held += more
        except (UnicodeDecodeError, RecursionError) as problem:
            kind = "bad UTF-8" if isinstance(problem, UnicodeDecodeError) else "broken JSON"
            report.bad(kind, f"{file.name} after record {number}")
