"""The shapes that conversations come in: chat messages, prompt and response, GSM8K, Alpaca, ShareGPT.

A shape names its fields and turns a record into turns. To add one: its row, its case.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hildanext.core.errors import DataError
from hildanext.data.chat_template import BadExample, Example, Message, make_example
from hildanext.data.turns import WEIGHT, unknown_key, unread_key

GRAPH = "causal_graph"
ANNOTATION = re.compile(r"<<[^<>=]*=[^<>]*>>")
"""GSM8K's calculator annotations, `<<48/2=24>>`: kept out of the trained text."""
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"),
    "system": "system",
}


class Turns(NamedTuple):
    """What a record says: its turns, and its last answer as the data has it, where training changes that."""

    messages: list[Message]
    raw: str | None = None
    unlearnt: frozenset[int] = frozenset()
    """Numbers of the turns of weight 0."""


class Shape(NamedTuple):
    """Fields that tell a shape, any of these sets, and how its records are read."""

    fields: tuple[frozenset[str], ...]
    read: Callable[[Mapping[str, Any]], Turns]


def _messages(record: Mapping[str, Any]) -> Turns:
    return _turns(record, "messages", "role", "content")


def _sharegpt(record: Mapping[str, Any]) -> Turns:
    turns = _turns(record, "conversations", "from", "value")
    return turns._replace(messages=[Message(SHAREGPT_ROLES.get(role, role), said) for role, said in turns.messages])


def _pair(record: Mapping[str, Any]) -> Turns:
    answer = "response" if "response" in record else "completion"
    return Turns([*_system(record), _said(record, "prompt", "user"), _said(record, answer, "assistant")])


def _gsm8k(record: Mapping[str, Any]) -> Turns:
    question, answer = _said(record, "question", "user"), _said(record, "answer", "assistant")
    return Turns([question, Message("assistant", ANNOTATION.sub("", answer.content))], answer.content)


def _alpaca(record: Mapping[str, Any]) -> Turns:
    """An optional `input` follows the instruction after an empty line."""
    instruction, answer = _said(record, "instruction", "user"), _said(record, "output", "assistant")
    more = record.get("input") or ""
    if not isinstance(more, str):
        raise BadExample("input is no string")
    question = f"{instruction.content}\n\n{more}" if more.strip() else instruction.content
    return Turns([*_system(record), Message("user", question), answer])


SHAPES: dict[str, Shape] = {
    "messages": Shape((frozenset({"messages"}),), _messages),
    "sharegpt": Shape((frozenset({"conversations"}),), _sharegpt),
    "pair": Shape((frozenset({"prompt", "response"}), frozenset({"prompt", "completion"})), _pair),
    "gsm8k": Shape((frozenset({"question", "answer"}),), _gsm8k),
    "alpaca": Shape((frozenset({"instruction", "output"}),), _alpaca),
}
"""Tried in this order where the shape is not named."""


def detect(record: Any) -> str:
    """The shape of a record. Raises `DataError`, naming what it has and what it could have."""
    has = set(record) if isinstance(record, Mapping) else set()
    for name, shape in SHAPES.items():
        if any(fields <= has for fields in shape.fields):
            return name
    known = "; ".join(f"{name}: {' + '.join(sorted(shape.fields[0]))}" for name, shape in SHAPES.items())
    shown = ", ".join(sorted(map(str, has))[:8]) if has else f"{type(record).__name__}, no object"
    raise DataError(f"cannot tell the shape of the first record ({shown})", f"name it, or rename its fields ({known})")


def read_record(shape: Shape, record: Any) -> Example:
    """The example of a record. Raises `BadExample`."""
    if not isinstance(record, Mapping):
        raise BadExample("not a JSON object")
    key = unread_key(record)
    if key is not None:
        raise BadExample(f"unread key {key!r} of a record", "what it holds would belong into the conversation")
    if _weight(record) == 0:
        raise BadExample("a record of weight 0")
    turns = shape.read(record)
    name = record.get("id")
    named = str(name) if isinstance(name, str | int) and not isinstance(name, bool) and str(name) else None
    return make_example(turns.messages, named, record.get(GRAPH), turns.raw, turns.unlearnt)


def _turns(record: Mapping[str, Any], name: str, role: str, content: str) -> Turns:
    """The turns of a list, after the record's own `system` where it has one. Raises `BadExample`."""
    turns, system = _list(record, name), _system(record)
    messages = [_turn(turn, role, content) for turn in turns]
    if system and any(message.role == "system" for message in messages):
        if messages[0] != system[0]:
            raise BadExample("system twice", "beside the turns and among them")
        system = []
    unlearnt = {number for number, turn in enumerate(turns, len(system)) if _weight(turn) == 0}
    return Turns([*system, *messages], unlearnt=frozenset(unlearnt))


def _weight(turn: Mapping[str, Any]) -> int:
    """Whether a turn is learnt: 1 or 0. Raises `BadExample`."""
    weight = turn.get(WEIGHT)
    if weight is None:
        return 1
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight not in (0, 1):
        raise BadExample(f"a {WEIGHT} that is neither 0 nor 1", f"{weight!r}"[:40])
    return int(weight)


def _list(record: Mapping[str, Any], name: str) -> list[Any]:
    turns = record.get(name)
    if not isinstance(turns, list):
        raise BadExample("no turns", f"missing {name}" if turns is None else f"{name} is no list")
    return turns


def _turn(turn: Any, role: str, content: str) -> Message:
    if not isinstance(turn, Mapping) or not isinstance(turn.get(role), str):
        raise BadExample(f"a turn without {role}")
    if not isinstance(turn.get(content), str):
        raise BadExample(f"a turn without {content}" if turn.get(content) is None else f"{content} is no string")
    key = unknown_key(turn, (role, content, WEIGHT))
    if key is not None:
        raise BadExample(f"unknown key {key[:40]!r} of a turn", "ignore_keys leaves it unread")
    return Message(turn[role], turn[content])


def _said(record: Mapping[str, Any], name: str, role: str) -> Message:
    content = record.get(name)
    if not isinstance(content, str):
        raise BadExample(f"missing {name}" if content is None else f"{name} is no string")
    return Message(role, content)


def _system(record: Mapping[str, Any]) -> list[Message]:
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise BadExample("system is no string")
    return [Message("system", system)] if system is not None and system.strip() else []
