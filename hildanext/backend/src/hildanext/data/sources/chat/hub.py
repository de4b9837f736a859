"""Conversations out of Hugging Face data sets, streamed."""

from collections.abc import Iterator

from hildanext.core.config import config
from hildanext.data.sources.base import Report
from hildanext.data.sources.chat.base import ChatSource, Record
from hildanext.data.sources.huggingface import HuggingFace


@config
class ChatHub(ChatSource):
    """A data set of the hub, or a local folder or loader name, read row by row."""

    dataset: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: str | tuple[str, ...] | None = None
    """For the loaders `json`, `parquet`: the files."""

    def records(self, report: Report) -> Iterator[Record]:
        rows = HuggingFace(
            dataset=self.dataset,
            subset=self.subset,
            split=self.split,
            revision=self.revision,
            data_files=self.data_files,
        )
        for number, row in rows.rows():
            yield Record(row, f"{self.dataset} row {number + 1}")
