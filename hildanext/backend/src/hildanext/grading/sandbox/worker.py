"""The untrusted side: loads a program and answers calls. Whatever goes wrong in here can only lose."""

import os
import sys
import types
from collections.abc import Callable
from typing import Any

from hildanext.grading.sandbox.channel import Channel, Closed
from hildanext.grading.sandbox.codec import BadMessage, Unsendable, decode, encode, pack, unpack

PROGRAM = "program"
"""The name of the module that the program becomes."""
OUT_OF_MEMORY = 77
"""Exit status where there is not even memory left to say so."""


class Caught:
    """Whatever ends a `with` block: the one place that stops at nothing, since a tested program may raise anything."""

    kind: type[BaseException] | None = None
    problem: BaseException | None = None

    def __enter__(self) -> "Caught":
        return self

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, _: object) -> bool:
        self.kind, self.problem = kind, problem
        return kind is not None


def serve(channel: Channel, most_bytes: int) -> None:
    """Load the program of the first message, then answer calls until the checker is gone."""
    with Caught() as end:
        _converse(channel, most_bytes)
    if end.kind is MemoryError:
        os._exit(OUT_OF_MEMORY)
    os._exit(0 if end.kind is Closed else 1)  # threads and exit handlers of the program get no say


def _converse(channel: Channel, most_bytes: int) -> None:
    message = unpack(channel.receive())
    module = types.ModuleType(PROGRAM)
    sys.modules[PROGRAM] = module
    function: Any = None
    with Caught() as trouble:
        exec(compile(message["load"], f"<{PROGRAM}>", "exec"), module.__dict__)
        function = module.__dict__[message["entry_point"]]
    channel.send(pack({"id": 0, **(_report(trouble) if trouble.kind else {"value": None})}))
    while True:
        call = unpack(channel.receive())
        channel.send(_answer(function, call, most_bytes))


def _answer(function: Any, call: dict[str, Any], most_bytes: int) -> bytes:
    def act() -> Any:
        return function(*decode(call["args"]), **decode(call["kwargs"]))

    with Caught() as trouble:
        return pack({"id": call["id"], **_attempt(act, most_bytes)})
    return pack({"id": call["id"], **_report(trouble)})


def _attempt(act: Callable[[], Any], most_bytes: int) -> dict[str, Any]:
    with Caught() as trouble:
        return {"value": encode(act(), most_bytes, PROGRAM)}
    return _report(trouble)


def _report(trouble: Caught) -> dict[str, Any]:
    if trouble.kind is MemoryError:
        return {"memory": True}
    if isinstance(trouble.problem, Unsendable):
        return {"unsendable": trouble.problem.why, "own": trouble.problem.own}
    if isinstance(trouble.problem, BadMessage):
        return {"unsendable": "arguments that do not arrive", "own": False}
    text, name, base = "", "an exception", ""
    with Caught():
        name = str(trouble.kind.__name__)[:80]  # type: ignore[union-attr]
        base = next(k.__name__ for k in trouble.kind.__mro__ if k.__module__ == "builtins")  # type: ignore[union-attr]
        text = str(trouble.problem)[:200]
    return {"raised": name, "base": base, "text": text}
