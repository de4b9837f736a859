"""Where documents come from. To add one: write the file, add its row, add its case."""

from hildanext.data.sources.base import Cursor, Document, FileSource, Report, Source
from hildanext.data.sources.dolma import Dolma
from hildanext.data.sources.huggingface import HuggingFace
from hildanext.data.sources.jsonl import JsonLines
from hildanext.data.sources.text import Text
from hildanext.data.sources.tinystories import TinyStories

SOURCES: dict[str, type[Source]] = {
    "text": Text,
    "jsonl": JsonLines,
    "dolma": Dolma,
    "tinystories": TinyStories,
    "huggingface": HuggingFace,
}

__all__ = ["SOURCES", "Cursor", "Document", "FileSource", "Report", "Source"]
