"""One JSON object per line, with a text field."""

from typing import ClassVar

from hildanext.core.config import config
from hildanext.data.sources.base import Document, FileSource, Report, decode, read_record


@config
class JsonLines(FileSource):
    """JSONL files, plain or gzip. `text_field` may be a dotted path (`message.content`)."""

    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".jsonl.gz", ".json", ".json.gz")

    text_field: str = "text"
    id_field: str = "id"

    def parse(self, raw: bytes, where: str, report: Report) -> Document | None:
        if not raw.strip():
            return None
        line = decode(raw, where, report)
        record = None if line is None else read_record(line, where, report)
        if record is None:
            return None
        text = value = record.value
        for name in self.text_field.split("."):
            if not isinstance(text, dict):
                report.bad("not a JSON object", where)
                return None
            text = text.get(name)
        if not isinstance(text, str):
            report.bad(f"missing {self.text_field}" if text is None else f"{self.text_field} is no string", where)
            return None
        if not text.strip():
            report.bad("empty document", where)
            return None
        return Document(text, str(value.get(self.id_field, where)))
