"""JSON that somebody else wrote: the one reader of it, for settings, requests, prompts, records and files of models.

What Python's reader takes beyond the standard, and what would stop something later on, is refused under a short name:

| kind | what | refused |
|---|---|---|
| `BROKEN` | no JSON at all, or nested deeper than `DEEPEST` | everywhere |
| `NO_UTF8` | bytes that are no UTF-8; a byte-order mark at the start of bytes is dropped | everywhere |
| `HALF` | half of a surrogate pair, in a text or a key: no tokenizer and no file takes it | everywhere |
| `TOO_LONG` | an integer of more digits than Python converts (4,300), also where nobody reads it | everywhere |
| `TWICE` | a key that stands twice in one object: which was meant is anybody's guess | unless `allow_duplicates` |
| `NAN` | `NaN`, `Infinity`, and numbers too large for a float | unless `allow_nan`: then they are None |

Settings, requests and prompts allow neither. Records of data sets allow NaN, which many programs write into fields that
nobody reads. What a program wrote for itself (a model's files, a run's own records) allows both.
"""

import json
import math
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NoReturn

from hildanext.core.errors import PromptError

DEEPEST = 100
"""Objects and lists inside each other; far from where anything that walks through a value would fail."""
BROKEN, NO_UTF8, HALF = "broken JSON", "bad UTF-8", "half of a surrogate pair"
TOO_LONG, TWICE, NAN = "a number of thousands of digits", "a key twice in one object", "NaN or infinity"
ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")


class BadJson(ValueError):
    """What is not read as JSON. `kind` is the short name under which a report counts it, `detail` says what or where.

    `end` is where the value ends in the text, which is known of all but `BROKEN`.
    """

    def __init__(self, kind: str, detail: str = "", end: int | None = None) -> None:
        super().__init__(f"{kind} ({detail})" if detail else kind)
        self.kind, self.detail, self.end = kind, detail, end


def parse(text: str | bytes, allow_nan: bool = False, allow_duplicates: bool = False) -> Any:
    """The value of a JSON text. Raises `BadJson`."""
    given = decode(text) if isinstance(text, bytes) else text
    try:
        value = _decoder(allow_nan, allow_duplicates).decode(given)
    except json.JSONDecodeError as problem:
        raise _broken(problem) from None
    except RecursionError:
        raise BadJson(BROKEN, "nested too deeply") from None
    except BadJson:
        raise
    except ValueError:
        raise BadJson(TOO_LONG) from None
    fault = _fault(value, given)
    if fault is not None:
        raise fault
    return value


def first_value(text: str, start: int, allow_nan: bool = False) -> tuple[Any, int]:
    """The value that begins at `start`, and where it ends. Raises `BadJson`."""
    faults: list[BadJson] = []
    try:
        value, end = _decoder(allow_nan, False).raw_decode(text, start)
    except json.JSONDecodeError as problem:
        raise _broken(problem) from None
    except RecursionError:
        raise BadJson(BROKEN, "nested too deeply") from None
    except ValueError:  # once more, to its end
        try:
            value, end = _make_decoder(allow_nan, False, faults.append).raw_decode(text, start)
        except json.JSONDecodeError as problem:
            raise _broken(problem) from None
    faults += [fault for fault in [_fault(value, text[start:end])] if fault is not None]
    if faults:
        raise BadJson(faults[0].kind, faults[0].detail, end)
    return value, end


def decode(raw: bytes) -> str:
    """The text of a file's bytes, without a byte-order mark. Raises `BadJson`."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise BadJson(NO_UTF8, f"at byte {problem.start}") from None


def has_half(text: str) -> bool:
    """Whether a text holds half of a surrogate pair, as bytes of a command line that are no UTF-8 do as well."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def check_prompt_text(text: str) -> None:
    """Raises `PromptError` for half of a surrogate pair, before a tokenizer's own exception."""
    if has_half(text):
        raise PromptError("the text holds half a character (a lone surrogate)", "send whole characters")


def as_read_back(value: Any, default: Callable[[Any], Any] | None = None) -> Any:
    """The value as it would come back from a JSON file: a copy, tuples as lists and keys as texts."""
    return json.loads(json.dumps(value, default=default))


@lru_cache
def _decoder(allow_nan: bool, allow_duplicates: bool) -> json.JSONDecoder:
    """A decoder that raises at once."""
    return _make_decoder(allow_nan, allow_duplicates, _refuse)


def _make_decoder(allow_nan: bool, allow_duplicates: bool, fault: Callable[[BadJson], Any]) -> json.JSONDecoder:
    """A decoder that hands what it must not take to `fault`, which raises it or keeps it."""

    def constant(name: str, what: str = "no number") -> None:
        if not allow_nan:
            fault(BadJson(NAN, f"{name}, which is {what}"))

    def number(text: str) -> float | None:
        value = float(text)
        if math.isfinite(value):
            return value
        constant(text[:40], "no finite number")
        return None

    def integer(text: str) -> int | None:
        try:
            return int(text)
        except ValueError:
            fault(BadJson(TOO_LONG))
            return None

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(items)
        if len(value) < len(items):
            keys = [key for key, _ in items]
            fault(BadJson(TWICE, ascii(next(key for key in keys if keys.count(key) > 1)[:40])))
        return value

    return json.JSONDecoder(
        parse_constant=constant,
        parse_float=number,
        parse_int=None if fault is _refuse else integer,  # a function for each integer costs time
        object_pairs_hook=None if allow_duplicates else pairs,
    )


def _refuse(problem: BadJson) -> NoReturn:
    raise problem


def _broken(problem: json.JSONDecodeError) -> BadJson:
    return BadJson(BROKEN, f"{problem.msg}, line {problem.lineno} column {problem.colno}")


def _fault(value: Any, text: str) -> BadJson | None:
    """What the decoder does not look at: depth and halves of characters."""
    if text.count("[") + text.count("{") > DEEPEST and _is_deeper(value):
        return BadJson(BROKEN, f"nested deeper than {DEEPEST}")
    if ESCAPED_HALF.search(text) and has_half(json.dumps(value, ensure_ascii=False)):
        return BadJson(HALF)
    return BadJson(HALF) if has_half(text) else None


def _is_deeper(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        items = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level = [item for inner in items for item in inner if isinstance(item, dict | list)]
        if not level:
            return False
    return True
