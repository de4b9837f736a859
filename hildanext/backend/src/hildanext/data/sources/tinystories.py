"""TinyStories: stories in one text file, each ended by a separator."""

from collections.abc import Iterator
from typing import ClassVar

from hildanext.core.config import config
from hildanext.data.sources.base import Document, FileSource, Line, Report, decode


@config
class TinyStories(FileSource):
    """Documents between `separator`s, as in `TinyStories-train.txt`. The separator is never part of a text.

    Paper: TinyStories, arXiv:2305.07759 (data: CDLA-Sharing-1.0).
    """

    suffixes: ClassVar[tuple[str, ...]] = (".txt", ".txt.gz")

    separator: str = "<|endoftext|>"

    def split(self, lines: Iterator[Line]) -> Iterator[Line]:
        separator = self.separator.encode()
        held: list[bytes] = []
        size, too_long, begun, at = 0, False, 0, 0
        for raw, start, end in lines:
            pieces = [b""] if raw is None else raw.split(separator)
            begun = begun if held or too_long else start
            at = start
            for number, piece in enumerate(pieces):
                too_long |= raw is None or size + len(piece) > self.max_line_bytes
                held = [] if too_long else held
                held.append(piece)
                size += len(piece) + 1
                at += len(piece) + len(separator)
                if number < len(pieces) - 1:
                    yield Line(None if too_long else b"\n".join(held), begun, at)
                    held, size, too_long, begun = [], 0, False, at
            at = end
        if too_long or any(held):
            yield Line(None if too_long else b"\n".join(held), begun, at)

    def parse(self, raw: bytes, where: str, report: Report) -> Document | None:
        text = decode(raw, where, report)
        if text is None or not text.strip():
            return None
        return Document(text.replace("\r\n", "\n").strip(), where)
