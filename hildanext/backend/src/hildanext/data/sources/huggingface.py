"""Hugging Face data sets, streamed: nothing is downloaded as a whole."""

import re
from collections.abc import Iterator
from typing import Any

from hildanext.core.config import config
from hildanext.core.errors import ConfigError, DataError
from hildanext.data.sources.base import Cursor, Document, Report, Source

TROUBLES = (OSError, ValueError, EOFError, RuntimeError)
"""What the library raises for a hub that is out of reach, a name that does not exist, or a file that cannot be read."""


@config
class HuggingFace(Source):
    """A data set of the hub (or a local folder or loader name) read row by row."""

    dataset: str
    subset: str | None = None
    split: str = "train"
    """A name, or some of its rows as in `train[:1000]` and `train[1000:1200]`."""
    text_field: str = "text"
    id_field: str = "id"
    revision: str | None = None
    data_files: str | tuple[str, ...] | None = None
    """For the loaders `json`, `text`, `parquet`: the files."""

    def __post_init__(self) -> None:
        _part(self.split)

    def read(
        self, report: Report, shard: int = 0, shards: int = 1, start: Cursor | None = None
    ) -> Iterator[tuple[Document, Cursor]]:
        done = start.record if start is not None else 0
        for record, row in self.rows(done):
            if record % shards != shard:
                continue
            where = f"{self.dataset} row {record + 1}"
            text = row.get(self.text_field)
            if not isinstance(text, str):
                report.bad(f"missing {self.text_field}" if text is None else f"{self.text_field} is no string", where)
            elif not text.strip():
                report.bad("empty document", where)
            else:
                yield Document(text, str(row.get(self.id_field, where))), Cursor(0, 0, record + 1)

    def rows(self, done: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows from number `done` on, each with its number. Raises `DataError` where they cannot be had."""
        rows = iter(self._open(done))
        record = done
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except TROUBLES as problem:
                raise DataError(
                    f"the data set {self.dataset!r} broke off after {record} rows ({_reason(problem)})",
                    "run the same command again: it goes on after the last whole shard",
                ) from None
            yield record, row
            record += 1

    def _open(self, done: int) -> Any:
        try:
            import datasets
        except ModuleNotFoundError:
            raise DataError("the huggingface source needs the package 'datasets'", "pip install datasets") from None
        split, first, end = _part(self.split)
        options = {"revision": self.revision} if self.data_files is None else {"data_files": self.data_files}
        try:
            rows = datasets.load_dataset(self.dataset, self.subset, split=split, streaming=True, **options)
        except TROUBLES as problem:
            raise DataError(
                f"cannot open the data set {self.dataset!r} ({_reason(problem)})",
                "check its name, subset and split, and that the hub can be reached; a local folder works too",
            ) from None
        rows = rows.skip(first + done) if first + done else rows
        return rows if end is None else rows.take(max(end - first - done, 0))


def _part(split: str) -> tuple[str, int, int | None]:
    """Name, first row and the row to end before. The library itself slices no streams. Raises `ConfigError`."""
    name, bracket, rest = split.partition("[")
    match = re.fullmatch(r"(\d*):(\d*)\]", rest)
    if bracket and match is None:
        raise ConfigError(f"split {split!r}", "write train, train[:1000] or train[1000:1200], in rows")
    first, end = match.groups() if match is not None else ("", "")
    return name, int(first or 0), int(end) if end else None


def _reason(problem: BaseException) -> str:
    text = str(problem).strip()
    return text.splitlines()[0][:200] if text else type(problem).__name__
