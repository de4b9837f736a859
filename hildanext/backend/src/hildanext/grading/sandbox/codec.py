"""Values as text between the checker and a worker it does not trust: plain types only, sizes bounded both ways.

None, booleans, integers of up to 63 bits, finite floats, strings and lists are JSON's own. The rest is an object with
one key: `t` tuple, `d` dictionary as pairs, `s` set, `z` frozenset, `b` bytes, `i` a long integer in hexadecimal, `f` a
float that JSON has no word for. What is decoded is of these exact types: a subclass sent as its base is that base.
"""

import json
from typing import Any, NoReturn

DEEPEST = 50
LONGEST_INTEGER_BITS = 16_384
"""Python itself refuses to print an integer of more than 4300 digits (14,285 bits)."""

_NUMBERS = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}
_CONTAINERS = {"t": tuple, "s": set, "z": frozenset}


class Unsendable(Exception):
    """A value that this codec does not carry. `own` is True for an object of a class that the program made itself."""

    def __init__(self, why: str, own: bool = False) -> None:
        super().__init__(why)
        self.why = why
        self.own = own


class BadMessage(Exception):
    """Text that no honest encoder writes."""


class _Encoder:
    def __init__(self, most_bytes: int, own_module: str) -> None:
        self.left = most_bytes
        self.own_module = own_module

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise Unsendable("a value too large to send")

    def encode(self, value: Any, depth: int) -> Any:
        if depth > DEEPEST:
            raise Unsendable(f"a value nested deeper than {DEEPEST}")
        self.spend(1)
        if value is None or value is True or value is False:
            return value
        if isinstance(value, str):
            self.spend(len(value))
            return str.__str__(value)
        if isinstance(value, int):
            return self.integer(int.__int__(value))
        if isinstance(value, float):
            return self.real(float.__float__(value))
        if isinstance(value, bytes):
            self.spend(2 * len(value))
            return {"b": bytes.hex(value)}
        return self.container(value, depth)

    def integer(self, value: int) -> Any:
        if -(2**63) <= value < 2**63:
            return value
        if value.bit_length() > LONGEST_INTEGER_BITS:
            raise Unsendable(f"an integer of {value.bit_length()} bits")
        self.spend(value.bit_length() // 4)
        return {"i": hex(value)}

    def real(self, value: float) -> Any:
        if value - value == 0.0:
            return value
        return {"f": "nan" if value != value else "inf" if value > 0 else "-inf"}

    def container(self, value: Any, depth: int) -> Any:
        if isinstance(value, list):
            return self.items(list.__iter__(value), list.__len__(value), depth)
        if isinstance(value, dict):
            self.spend(2 * dict.__len__(value))
            pairs = dict.items(value)
            return {"d": [[self.encode(key, depth + 1), self.encode(item, depth + 1)] for key, item in pairs]}
        for key, kind in _CONTAINERS.items():
            if isinstance(value, kind):
                return {key: self.items(kind.__iter__(value), kind.__len__(value), depth)}  # type: ignore[attr-defined]
        own = type(value).__module__ == self.own_module
        raise Unsendable(f"a value of type {type(value).__name__!r}", own)

    def items(self, values: Any, length: int, depth: int) -> list[Any]:
        self.spend(length)
        return [self.encode(value, depth + 1) for value in values]


def encode(value: Any, most_bytes: int, own_module: str = "") -> Any:
    """A JSON value for `value`. Raises `Unsendable` for other types, cycles, and what is too deep or too large."""
    return _Encoder(most_bytes, own_module).encode(value, 0)


def decode(value: Any, depth: int = 0) -> Any:
    """The value that `encode` was given, in exact builtin types. Raises `BadMessage` for anything else."""
    if depth > DEEPEST:
        raise BadMessage(f"nested deeper than {DEEPEST}")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [decode(item, depth + 1) for item in value]
    if type(value) is not dict or len(value) != 1:
        raise BadMessage("an object that is no tagged value")
    ((tag, inner),) = value.items()
    try:
        if tag in _CONTAINERS and type(inner) is list:
            return _CONTAINERS[tag](decode(item, depth + 1) for item in inner)
        if tag == "d" and type(inner) is list:
            return {decode(key, depth + 1): decode(item, depth + 1) for key, item in inner}
        if tag == "i" and type(inner) is str and len(inner) <= LONGEST_INTEGER_BITS // 4 + 3:
            return int(inner, 16)
        if tag == "f" and type(inner) is str:
            return _NUMBERS[inner]
        if tag == "b" and type(inner) is str:
            return bytes.fromhex(inner)
    except (TypeError, ValueError, KeyError):
        raise BadMessage(f"a malformed value tagged {tag!r}") from None
    raise BadMessage(f"a value tagged {tag[:20]!r}")


def pack(message: dict[str, Any]) -> bytes:
    """A message as ASCII JSON; lone surrogates survive as escapes."""
    return json.dumps(message, allow_nan=False, separators=(",", ":")).encode("ascii")


def unpack(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`. Raises `BadMessage` for anything else, at any depth and with numbers of any length."""
    try:
        message = json.loads(data.decode("ascii"), parse_int=_short_integer, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise BadMessage("not a message") from None
    if type(message) is not dict:
        raise BadMessage("not an object")
    return message


def _short_integer(text: str) -> int:
    if len(text) > 20:
        raise BadMessage("a long integer without its tag")
    return int(text)


def _no_constant(text: str) -> NoReturn:
    raise BadMessage(f"{text} without its tag")
