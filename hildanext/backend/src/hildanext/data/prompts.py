"""A file of prompts: one per line, as text or as JSON."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hildanext.core.errors import DataError

ROLES = ("system", "user", "assistant")


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
        record: dict[str, Any] = {"line": self.line} if self.id is None else {"line": self.line, "id": self.id}
        if self.text is not None:
            return {**record, "prompt": self.text}
        return {**record, "messages": [{"role": role, "content": content} for role, content in self.messages]}


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a text file (one per line) or of a `.jsonl` file; blank lines are none.

    A line of JSON is a string, or an object with `prompt` (text) or `messages` (of role and content), and maybe an
    `id`; its other keys are left alone. Raises `DataError` with the line's number.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as problem:
        raise DataError(f"cannot read the prompts in {str(path)!r} ({problem})", "give a UTF-8 text file") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"no prompts in {str(path)!r}", "write one per line")
    if path.suffix == ".jsonl":
        return [_parsed(path, number, line) for number, line in lines]
    return [Prompt(number, text=line.rstrip("\r")) for number, line in lines]


def _parsed(path: Path, number: int, line: str) -> Prompt:
    def wrong(what: str) -> DataError:
        return DataError(f"{path} line {number}: {what}", 'write "text", {"prompt": ...} or {"messages": [...]}')

    try:
        value = json.loads(line)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise wrong("half of a surrogate pair is no text") from None
    except (ValueError, RecursionError):
        raise wrong("no JSON") from None
    if isinstance(value, str):
        return Prompt(number, text=value)
    if not isinstance(value, Mapping) or ("prompt" in value) == ("messages" in value):
        raise wrong("one of prompt and messages is needed")
    name = value.get("id")
    if name is not None and not isinstance(name, str | int):
        raise wrong("id is neither text nor a whole number")
    if "prompt" in value:
        if not isinstance(value["prompt"], str):
            raise wrong("prompt is no text")
        return Prompt(number, text=value["prompt"], id=name)
    messages = value["messages"]
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        raise wrong(f"messages is no list of role ({', '.join(ROLES)}) and content")
    return Prompt(number, messages=tuple((message["role"], message["content"]) for message in messages), id=name)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("role") in ROLES and isinstance(value.get("content"), str)
