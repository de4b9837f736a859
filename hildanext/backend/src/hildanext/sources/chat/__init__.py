"""Where conversations come from. To add one: write the file, add its row, add its case."""

from hildanext.sources.chat.arithmetic import Arithmetic
from hildanext.sources.chat.base import ChatSource, StrictReport
from hildanext.sources.chat.files import ChatFiles
from hildanext.sources.chat.hub import ChatHub
from hildanext.sources.chat.shapes import SHAPES

CHATS: dict[str, type[ChatSource]] = {
    "files": ChatFiles,
    "huggingface": ChatHub,
    "arithmetic": Arithmetic,
}

__all__ = ["CHATS", "SHAPES", "ChatSource", "StrictReport"]
