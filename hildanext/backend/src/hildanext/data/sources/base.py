"""What a source of documents is, and the bounded reading of files that all file sources share.

A source is its own configuration and holds no running state: what was wrong with the input goes into the
`Report` that is passed in, and where the reader stands travels as a `Cursor`. Nothing found *inside* a
corpus is fatal here; `prepare` decides at the end whether enough was read.
"""

import glob
import gzip
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from io import BufferedIOBase
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pydantic import Field

from hildanext.core.config import config
from hildanext.core.errors import DataError
from hildanext.core.json_text import BadJson, parse
from hildanext.core.json_text import decode as decode_text
from hildanext.core.run_dir import expand_home

CHUNK = 1 << 18
"""Bytes read at once."""

KEPT_EXAMPLES = 8
"""How many places a report remembers in words."""


class Document(NamedTuple):
    """One text and where it comes from."""

    text: str
    id: str


class Record(NamedTuple):
    """One record and where it stands, in words."""

    value: Any
    where: str


class Cursor(NamedTuple):
    """Where a reader stands: everything before it was read. JSON-friendly, so that a journal can hold it."""

    file: int = 0
    """Index in the sorted list of files."""
    offset: int = 0
    """Byte after the last record read, in the decompressed file."""
    record: int = 0
    """Records of this file that lie before the offset, good or bad."""


class Report:
    """What a reader met that it could not use, counted by kind, with the first few places in words."""

    def __init__(self, counts: dict[str, int] | None = None, examples: list[str] | None = None) -> None:
        self._counts: Counter[str] = Counter(counts if counts is not None else {})
        self._examples: list[str] = list(examples if examples is not None else [])
        self._snapshot: dict[str, Any] | None = None

    def bad(self, kind: str, where: str) -> None:
        """Count one unusable thing."""
        self._counts[kind] += 1
        if len(self._examples) < KEPT_EXAMPLES:
            self._examples.append(f"{where}: {kind}")
        self._snapshot = None

    @property
    def counts(self) -> dict[str, int]:
        return dict(sorted(self._counts.items()))

    @property
    def total(self) -> int:
        return sum(self._counts.values())

    def snapshot(self) -> dict[str, Any]:
        """The report as JSON types; the same object is handed out until something new is counted."""
        if self._snapshot is None:
            self._snapshot = {"counts": self.counts, "examples": list(self._examples)}
        return self._snapshot

    def summary(self) -> str:
        """One line: `3 broken JSON, 1 missing text (first: a.jsonl line 7: broken JSON)`."""
        if not self._counts:
            return "nothing was refused"
        counts = ", ".join(f"{count} {kind}" for kind, count in self.counts.items())
        return f"{counts} (first: {self._examples[0]})"


class Line(NamedTuple):
    """One record of a file before it is understood; `raw` None means that it was longer than allowed."""

    raw: bytes | None
    start: int
    end: int
    """Where the next one starts; bytes of the decompressed file."""


@config
class Source:
    """Where documents come from."""

    def read(
        self, report: Report, shard: int = 0, shards: int = 1, start: Cursor | None = None
    ) -> Iterator[tuple[Document, Cursor]]:
        """Documents of part `shard` of `shards` from `start` on, each with the cursor that follows it."""
        raise NotImplementedError

    def documents(self, shard: int = 0, shards: int = 1, report: Report | None = None) -> Iterator[Document]:
        """The documents alone. Parts are disjoint and together they are the whole."""
        for document, _ in self.read(report if report is not None else Report(), shard, shards):
            yield document

    def fingerprint(self) -> list[Any]:
        """What identifies the input beyond the knobs, so that a resumed run notices that it changed."""
        return []

    def whole(self) -> int:
        """How many files there are; 0 where the source has no files."""
        return 0

    def share_before(self) -> Callable[[Cursor], float | None]:
        """How much of the input lies before a cursor; None where that is not known."""
        return lambda cursor: None


@config
class FileSource(Source):
    """Documents out of files, plain or gzip: a file, a folder, a glob pattern, or a list of these.

    With at least as many files as parts, a part takes every `shards`-th file; else every `shards`-th record.
    """

    suffixes: ClassVar[tuple[str, ...]] = ()
    """Endings taken when a folder is given."""

    path: str | tuple[str, ...]
    max_line_bytes: int = Field(default=8 << 20, ge=16)
    """A longer line is counted and skipped; it bounds the memory whatever the input."""

    def split(self, lines: Iterator[Line]) -> Iterator[Line]:
        """Group a file's lines into records. The default: each line is one."""
        return lines

    def parse(self, raw: bytes, where: str, report: Report) -> Document | None:
        """Understand one record; None (and a count in the report) for one that cannot be used."""
        raise NotImplementedError

    def files(self) -> list[Path]:
        """The input files, sorted. Raises `DataError` where there is none."""
        paths = (self.path,) if isinstance(self.path, str) else self.path
        files = sorted({file for path in paths for file in self._expand(path)}, key=lambda file: file.as_posix())
        if not files:
            raise DataError(f"no input files at {', '.join(map(repr, paths))}", self._looked_for())
        return files

    def fingerprint(self) -> list[Any]:
        return [[file.name, file.stat().st_size] for file in self.files()]

    def whole(self) -> int:
        return len(self.files())

    def share_before(self) -> Callable[[Cursor], float | None]:
        """By bytes of the files as they are read."""
        sizes = [_size(file) for file in self.files()]
        begins = [0, *accumulate(sizes)]

        def share(cursor: Cursor) -> float:
            inside = min(cursor.offset, sizes[cursor.file])
            return (begins[cursor.file] + inside) / max(begins[-1], 1)

        return share

    def read(
        self, report: Report, shard: int = 0, shards: int = 1, start: Cursor | None = None
    ) -> Iterator[tuple[Document, Cursor]]:
        files = self.files()
        by_file = len(files) >= shards
        cursor = start if start is not None else Cursor()
        for index in range(cursor.file, len(files)):
            if by_file and index % shards != shard:
                continue
            at = cursor if index == cursor.file else Cursor(index)
            part = (0, 1) if by_file else (shard, shards)
            yield from self._read_file(files[index], at, report, part)

    def _read_file(
        self, file: Path, start: Cursor, report: Report, part: tuple[int, int]
    ) -> Iterator[tuple[Document, Cursor]]:
        record = start.record
        first_part = part[0] == 0  # troubles of the file as a whole are counted once, not once per part
        try:
            with open_binary(file) as stream:
                if start.offset == 0 and b"\0" in stream.read1(CHUNK):
                    if first_part:
                        report.bad("binary file", file.name)
                    return
                stream.seek(start.offset)
                for raw, _, end in self.split(read_lines(stream, start.offset, self.max_line_bytes)):
                    record += 1
                    if (record - 1) % part[1] != part[0]:
                        continue
                    where = f"{file.name} record {record}"
                    if raw is None:
                        report.bad(f"longer than {self.max_line_bytes} bytes", where)
                        continue
                    document = self.parse(raw, where, report)
                    if document is not None:
                        yield document, Cursor(start.file, end, record)
        except (EOFError, gzip.BadGzipFile, zlib.error):
            if first_part:
                report.bad("broken gzip", file.name)
        except OSError as problem:
            raise DataError(
                f"cannot read {str(file)!r} ({problem.strerror})", "check the path and its permissions"
            ) from None

    def _expand(self, path: str) -> Iterator[Path]:
        place = expand_home(path)
        if place.is_file():
            yield place
        elif place.is_dir():
            for file in place.rglob("*"):
                if file.is_file() and file.name.endswith(self.suffixes):
                    yield file
        elif glob.has_magic(path):
            yield from (Path(name) for name in glob.glob(str(place), recursive=True) if Path(name).is_file())
        else:
            raise DataError(
                f"no such file or folder {path!r}", "check the source's path; a pattern such as '*.json.gz' is fine too"
            )

    def _looked_for(self) -> str:
        return f"give a file, a pattern, or a folder with files ending in {', '.join(self.suffixes)}"


def open_binary(file: Path) -> BufferedIOBase:
    """Open a plain or gzip file for reading bytes; gzip is known by its first two bytes, not by its name."""
    if _is_gzip(file):
        return gzip.open(file, "rb")
    if file.name.endswith(".gz") and file.stat().st_size > 0:
        raise gzip.BadGzipFile(f"{file.name} is no gzip file")
    return open(file, "rb")


def _is_gzip(file: Path) -> bool:
    with open(file, "rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def _size(file: Path) -> int:
    """Bytes when it is read: of a gzip what its last four bytes say, which is wrong beyond 4 GiB or of several in one;
    then, as far as it can be seen, three times its own."""
    size = file.stat().st_size
    if size < 18 or not _is_gzip(file):  # no shorter gzip is whole
        return size
    with open(file, "rb") as stream:
        stream.seek(-4, 2)
        told = int.from_bytes(stream.read(4), "little")
    return told if told >= size // 2 else 3 * size


def read_lines(stream: BufferedIOBase, start: int, limit: int) -> Iterator[Line]:
    """Lines (without the newline) with the offset after each, in memory bounded by `limit` plus one chunk."""
    held, too_long, end, begun = b"", False, start, start
    while chunk := stream.read1(CHUNK):  # read1 keeps what precedes a break in a gzip
        *complete, tail = chunk.split(b"\n")
        for piece in complete:
            end += len(piece) + 1
            too_long |= len(held) + len(piece) > limit
            yield Line(None if too_long else held + piece, begun, end)
            held, too_long, begun = b"", False, end
        end += len(tail)
        too_long |= len(held) + len(tail) > limit
        held = b"" if too_long else held + tail
    if held or too_long:
        yield Line(None if too_long else held, begun, end)


def decode(raw: bytes, where: str, report: Report) -> str | None:
    """UTF-8 text without a byte-order mark; None (counted) for anything else."""
    try:
        return decode_text(raw)
    except BadJson as problem:
        report.bad(problem.kind, where)
        return None


def read_record(text: str, where: str, report: Report) -> Record | None:
    """The record of a line; None, counted, where it is no JSON that is taken."""
    try:
        return Record(parse(text, allow_nan=True), where)
    except BadJson as problem:
        report.bad(problem.kind, where)
        return None
