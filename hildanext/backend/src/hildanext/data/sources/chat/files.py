"""Conversations out of files: JSON lines or one JSON array, plain or gzip."""

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from hildanext.core.config import config
from hildanext.data.json_records import JsonRecords
from hildanext.data.sources.base import Record, Report
from hildanext.data.sources.chat.base import ChatSource


@config
class ChatFiles(ChatSource):
    """A file, a folder (searched in depth), a pattern, or a list of these."""

    path: str | tuple[str, ...]
    max_line_bytes: int = Field(default=8 << 20, ge=16)
    """A longer record is counted and skipped; it bounds the memory whatever the input."""

    def records(self, report: Report) -> Iterator[Record]:
        return self._files().records(report)

    def fingerprint(self) -> list[Any]:
        return self._files().fingerprint()

    def _files(self) -> JsonRecords:
        return JsonRecords(path=self.path, max_line_bytes=self.max_line_bytes)
