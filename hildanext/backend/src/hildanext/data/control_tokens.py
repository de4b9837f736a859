"""Control tokens that a message spells out: text of the message, told apart from those that the template writes.

They are replaced by marks of equal length before the template is rendered, so that whatever control tokens stand in the
rendering are the template's own. Where a message spells none, nothing here changes a thing.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from hildanext.core.errors import DataError

MARKS = 0x100000
"""First character of the last plane for private use: marks are taken from there."""
CODES = 0xF0000
"""As `MARKS`, of the plane before: what the template's control tokens are called while a marked text is encoded."""

Encoded = tuple[list[int], list[tuple[int, int]]]
"""Token ids, and each token's characters."""


class Unspeakable(DataError):
    """A message spells a control token that this tokenizer, or this template, cannot keep apart from a real one."""


@dataclass(frozen=True)
class Marks:
    """A character for each control token that the messages spell."""

    letters: Mapping[str, str]
    names: Mapping[str, tuple[str, ...]]
    """What is marked in a message, by its role."""

    def put(self, role: str, content: str) -> str:
        """A message with marks in place of control tokens."""
        return _pattern(self.names[role]).sub(lambda found: self.letters[found[0]] * len(found[0]), content)

    def lift(self, text: str) -> str:
        """The text as it was."""
        for name, letter in self.letters.items():
            text = text.replace(letter * len(name), name)
        return text


def control_names(tokenizer: Any, role: str = "") -> set[str]:
    """The special tokens; of a user's message also what the template writes, though it is not marked as special."""
    added = {str(token): bool(token.special) for token in tokenizer.added_tokens_decoder.values()}
    names = {name for name, special in added.items() if special} | {str(name) for name in tokenizer.all_special_tokens}
    if role == "user":
        # str() of several templates by name holds them all.
        names |= {name for name in added if name.strip() and name in str(tokenizer.chat_template or "")}
    return names - {""}


def find_marks(tokenizer: Any, messages: Sequence[tuple[str, str]]) -> Marks | None:
    """Marks for what the messages (role, content) spell; None where that is nothing."""
    names = {role: tuple(sorted(control_names(tokenizer, role))) for role, _ in messages}
    spelt = {name for role, content in messages for name in _pattern(names[role]).findall(content)}
    if not spelt:
        return None
    used = {ord(letter) for _, content in messages for letter in content}
    free = (code for code in range(MARKS, 0x10FFFE) if code not in used)
    return Marks({name: chr(next(free)) for name in sorted(spelt)}, names)


def encode_marked(tokenizer: Any, text: str, marks: Marks) -> Encoded:
    """Tokens of a rendering with marks: the template's control tokens parsed, those of the messages as text.

    Raises `Unspeakable`.
    """
    names = tuple(sorted(control_names(tokenizer) | set(marks.letters)))
    copy = _renamed(tokenizer, names)
    if any(CODES <= ord(letter) < CODES + len(names) for letter in text):
        raise Unspeakable("a message has control tokens and private characters", "leave one of them out")
    written = _pattern(names).findall(text)
    coded = _pattern(names).sub(lambda found: copy.codes[found[0]], text)
    encoding = copy.backend.encode(marks.lift(coded), add_special_tokens=False)
    parsed = [id for id in encoding.ids if id in copy.coded]
    own = {id for id in map(tokenizer.convert_tokens_to_ids, names) if id != tokenizer.unk_token_id}
    if len(parsed) != len(written) or own.intersection(id for id in encoding.ids if id not in copy.original):
        spelled = ", ".join(marks.letters)
        raise Unspeakable(f"this tokenizer cannot write {spelled} as text", "leave it out of the message")
    return [copy.original.get(id, id) for id in encoding.ids], [(int(a), int(b)) for a, b in encoding.offsets]


@dataclass(frozen=True)
class _Renamed:
    """A copy of a tokenizer's backend whose control tokens have other names, of the same lengths."""

    names: tuple[str, ...]
    backend: Any
    codes: Mapping[str, str]
    coded: frozenset[int]
    """The copy's ids of renamed tokens."""
    original: Mapping[int, int]
    """Of the copy's id of each added token the tokenizer's."""


_copies: "WeakKeyDictionary[Any, _Renamed]" = WeakKeyDictionary()


def _renamed(tokenizer: Any, names: tuple[str, ...]) -> _Renamed:
    known = _copies.get(tokenizer)
    if known is not None and known.names == names:
        return known
    codes = {name: chr(CODES + at) * len(name) for at, name in enumerate(names)}
    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    state |= {"truncation": None, "padding": None}
    ids = {token["content"]: token["id"] for token in state["added_tokens"]}
    for token in state["added_tokens"]:
        token["content"] = codes.get(token["content"], token["content"])
    copy = type(backend).from_str(json.dumps(state))
    copy.encode_special_tokens = False
    there = {name: copy.token_to_id(codes.get(name, name)) for name in ids}
    made = _Renamed(
        names,
        copy,
        codes,
        frozenset(there[name] for name in names if name in there),
        {there[name]: id for name, id in ids.items()},
    )
    _copies[tokenizer] = made
    return made


@lru_cache(maxsize=16)
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    """Finds what a tokenizer finds: the first, and of several there the longest."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")
