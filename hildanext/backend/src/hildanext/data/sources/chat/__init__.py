"""Where conversations come from. To add one: write the file, add its row, add its case."""

from hildanext.data.sources.chat.arithmetic import Arithmetic
from hildanext.data.sources.chat.base import ChatSource, StrictReport
from hildanext.data.sources.chat.files import ChatFiles
from hildanext.data.sources.chat.hub import ChatHub
from hildanext.data.sources.chat.problem_answers import ProblemAnswers
from hildanext.data.sources.chat.shapes import SHAPES

CHATS: dict[str, type[ChatSource]] = {
    "files": ChatFiles,
    "huggingface": ChatHub,
    "arithmetic": Arithmetic,
    "problems": ProblemAnswers,
}

__all__ = ["CHATS", "SHAPES", "ChatSource", "StrictReport"]
