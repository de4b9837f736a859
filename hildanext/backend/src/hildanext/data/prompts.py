"""A file of prompts: one per line, as text or as JSON. Every door that takes such a file reads it here."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hildanext.core.errors import DataError
from hildanext.core.json_text import BROKEN, BadJson, decode, parse
from hildanext.data.turns import OF_RECORDS, ROLES, WEIGHT, unknown_key, unread_key

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """One line of the file: a text to continue (or, in a chat, to answer), or a conversation to go on with."""

    line: int
    """Of the file, from 1."""
    text: str | None = None
    messages: tuple[tuple[str, str], ...] = ()
    """Role and content."""
    id: str | int | None = None

    def as_json(self) -> dict[str, Any]:
        return {"line": self.line, **self.said()}

    def said(self) -> dict[str, Any]:
        """Its id and what is asked, wherever it stands."""
        record: dict[str, Any] = {} if self.id is None else {"id": self.id}
        if self.text is not None:
            return {**record, "prompt": self.text}
        return {**record, "messages": [{"role": role, "content": content} for role, content in self.messages]}


def read_prompts(path: str | Path, field: str = "prompt") -> list[Prompt]:
    """The prompts of a text file (one per line) or of a `.jsonl` file, where `field` holds the text.

    A line ends at a line feed, with or without a carriage return before it; other breaks stay inside a prompt. A
    byte-order mark at the start is dropped. Blank lines are no prompts; they are counted in the log. A line of JSON is
    a string, or an object with `field` (text) or `messages` (of role and content), and maybe an `id`; other keys are
    left alone where they do not belong into what the model reads. Raises `DataError` with the line's number.
    """
    path = Path(path)
    try:
        text = decode(path.read_bytes())
    except OSError as problem:
        raise DataError(f"cannot read the prompts in {str(path)!r} ({problem.strerror})", "give a text file") from None
    except BadJson as problem:
        raise DataError(f"the prompts in {str(path)!r} are no UTF-8 ({problem.detail})", "save them as UTF-8") from None
    everything = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []
    lines = [(number, line) for number, line in enumerate(everything, 1) if line.strip()]
    if not lines:
        raise DataError(f"no prompts in {str(path)!r}", "write one per line")
    if len(lines) < len(everything):
        logger.warning("%s: blank lines skipped: %d", path, len(everything) - len(lines))
    if path.suffix == ".jsonl":
        return [_parsed(path, number, line, field) for number, line in lines]
    return [Prompt(number, text=line) for number, line in lines]


def _parsed(path: Path, number: int, line: str, field: str) -> Prompt:
    def wrong(what: str) -> DataError:
        return DataError(f"{path} line {number}: {what}", f'write "text", {{"{field}": ...}} or {{"messages": [...]}}')

    try:
        value = parse(line)
    except BadJson as problem:
        raise wrong(f"no JSON ({problem.detail})" if problem.kind == BROKEN else str(problem)) from None
    if isinstance(value, str):
        return Prompt(number, text=value)
    if not isinstance(value, Mapping) or (field in value) == ("messages" in value):
        raise wrong(f"one of {field} and messages is needed")
    unread = unread_key(value, (*OF_RECORDS, "system"))
    if unread is not None:
        raise wrong(f"nobody reads {unread!r}; a system's turn belongs into messages")
    name = value.get("id")
    if name is not None and not isinstance(name, str | int):
        raise wrong("id is neither text nor a whole number")
    if field in value:
        if not isinstance(value[field], str):
            raise wrong(f"{field} is no text")
        return Prompt(number, text=value[field], id=name)
    messages = value["messages"]
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        raise wrong(f"messages is no list of role ({', '.join(ROLES)}) and content")
    unknown = next(filter(None, (unknown_key(message, ("role", "content", WEIGHT)) for message in messages)), None)
    if unknown is not None:
        raise wrong(f"nobody reads the key {unknown!r} of a message")
    return Prompt(number, messages=tuple((message["role"], message["content"]) for message in messages), id=name)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("role") in ROLES and isinstance(value.get("content"), str)
