"""Plain text: a file, a folder of files, or files cut at a separator."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from hildanext.core.config import config
from hildanext.data.sources.base import Document, FileSource, Line, Report, decode


@config
class Text(FileSource):
    """Plain UTF-8 text. A document is a whole file, a paragraph (until an empty line) or a line.

    A file longer than `max_line_bytes` becomes several documents, cut between lines.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".txt", ".md", ".text", ".txt.gz")

    document: Literal["file", "paragraph", "line"] = "file"

    def split(self, lines: Iterator[Line]) -> Iterator[Line]:
        if self.document == "line":
            return lines
        return _gather(lines, self.max_line_bytes, ends_at_empty=self.document == "paragraph")

    def parse(self, raw: bytes, where: str, report: Report) -> Document | None:
        text = decode(raw, where, report)
        if text is None or not text.strip():
            return None
        return Document(text.replace("\r\n", "\n").strip("\r\n"), where)


def _gather(lines: Iterator[Line], limit: int, ends_at_empty: bool) -> Iterator[Line]:
    held: list[bytes] = []
    size = begun = end = 0
    for line in lines:
        full = line.raw is None or size + len(line.raw) + 1 > limit
        ends = ends_at_empty and line.raw is not None and not line.raw.strip()
        if held and (full or ends):
            yield Line(b"\n".join(held), begun, line.start)
            held, size = [], 0
        if line.raw is None:
            yield line
        elif not ends:
            begun = begun if held else line.start
            held.append(line.raw)
            size += len(line.raw) + 1
        end = line.end
    if held:
        yield Line(b"\n".join(held), begun, end)
