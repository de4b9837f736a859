"""Where documents come from. To add one: write the file, add its row, add its case."""

from hildanext.sources.base import Cursor, Document, FileSource, Report, Source
from hildanext.sources.dolma import Dolma
from hildanext.sources.huggingface import HuggingFace
from hildanext.sources.jsonl import JsonLines
from hildanext.sources.text import Text
from hildanext.sources.tinystories import TinyStories

SOURCES: dict[str, type[Source]] = {
    "text": Text,
    "jsonl": JsonLines,
    "dolma": Dolma,
    "tinystories": TinyStories,
    "huggingface": HuggingFace,
}

__all__ = ["SOURCES", "Cursor", "Document", "FileSource", "Report", "Source"]
