"""What a source of conversations is: records of some shape, and what becomes of the bad ones.

A bad record is counted by kind with the first few places in words; a source that is mostly bad is an error, and with
`strict` the first bad record is.
"""

import logging
from collections.abc import Iterator
from itertools import chain
from typing import Any, Literal

from pydantic import Field

from hildanext.core.config import config
from hildanext.core.errors import DataError
from hildanext.data.chat_template import BadExample, Example
from hildanext.data.sources.base import Record, Report
from hildanext.data.sources.chat.shapes import SHAPES, detect, read_record

logger = logging.getLogger(__name__)

ShapeName = Literal["auto", "messages", "pair", "gsm8k", "alpaca", "sharegpt"]
GIVEN_UP = 1000
"""Bad records at the beginning after which a source is not read on."""


class StrictReport(Report):
    """A report that makes the first bad thing an error."""

    def bad(self, kind: str, where: str) -> None:
        raise DataError(f"{where}: {kind}", "mend the record, or set strict to false to leave such records out")


@config
class ChatSource:
    """Where conversations come from."""

    shape: ShapeName = "auto"
    """Which fields a record has (`SHAPES`); `auto` tells it from the first record."""
    rename: dict[str, str] = Field(default_factory=dict)
    """Fields of the records by the names that the shape expects: `{"prompt": "query"}`."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of records and of their turns to leave unread; any other that nobody reads refuses its record."""
    strict: bool = False
    """Make the first bad record an error instead of counting it."""

    def records(self, report: Report) -> Iterator[Record]:
        """The records, as JSON values. What is no record at all is counted in the report."""
        raise NotImplementedError

    def fingerprint(self) -> list[Any]:
        """What identifies the input beyond the knobs, so that a resumed run notices that it changed."""
        return []

    def examples(self, report: Report) -> Iterator[tuple[Example, str]]:
        """The conversations, each with its place in words; bad ones are counted.

        Raises `DataError` where the shape cannot be told, where there is nothing, where more than half is bad, and with
        `strict` at the first bad record.
        """
        before = report.total
        records = self._renamed(report)
        first = next(records, None)
        if first is None:
            raise DataError(f"no record could be read ({report.summary()})", "give JSON lines, or a JSON array")
        shape: str = self.shape
        if shape == "auto":
            shape = detect(first.value)
            logger.info("the records have the shape %r (told from %s)", shape, first.where)
        good = 0
        for record in chain([first], records):
            try:
                example = read_record(SHAPES[shape], record.value)
            except BadExample as problem:
                refuse(report, problem, record.where)
            else:
                good += 1
                yield example, record.where
            if not good and report.total - before >= GIVEN_UP:
                break
        refuse_mostly_bad(good, report.total - before, report)

    def _renamed(self, report: Report) -> Iterator[Record]:
        for record in self.records(report):
            if isinstance(record.value, dict) and self.rename:
                value = {**record.value, **{to: record.value.get(name) for to, name in self.rename.items()}}
                record = Record(value, record.where)
            yield Record(self._without_ignored(record.value), record.where) if self.ignore_keys else record

    def _without_ignored(self, value: Any) -> Any:
        """A record without the keys to ignore, its turns alike."""
        if isinstance(value, dict):
            kept = {key: item for key, item in value.items() if key not in self.ignore_keys}
            lists = {key: item for key, item in kept.items() if isinstance(item, list)}
            return kept | {key: [self._without_ignored(turn) for turn in item] for key, item in lists.items()}
        return value


def refuse(report: Report, problem: BadExample, where: str) -> None:
    """Count a bad conversation under its kind; the place in words says the rest."""
    report.bad(problem.kind, f"{where} ({problem.detail})" if problem.detail else where)


def refuse_mostly_bad(good: int, bad: int, report: Report) -> None:
    """Raise `DataError` where more was bad than good."""
    if bad > good:
        raise DataError(
            f"{bad} of {good + bad} records cannot be used ({report.summary()})",
            "is the shape right? set shape, or rename fields",
        )
