"""The one reader of JSON: what it takes and refuses, by kind, and that every door comes to it."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

import hildanext
from hildanext.core.config import override, read_json, read_value
from hildanext.core.errors import ConfigError, HildaError, PromptError
from hildanext.core.json_text import (
    BROKEN,
    DEEPEST,
    HALF,
    NAN,
    NO_UTF8,
    TOO_LONG,
    TWICE,
    BadJson,
    as_read_back,
    check_prompt_text,
    first_value,
    parse,
)
from hildanext.core.metrics_log import read_metrics
from hildanext.models.card import read_card
from hildanext.models.loading.files import read_model_json

DIGITS = "9" * 5000

REFUSED: dict[str, tuple[str | bytes, str]] = {
    "half": ('{"a": "x \\ud83d"}', HALF),
    "half, capitals": ('{"a": "x \\uDC00"}', HALF),
    "half in a key": ('{"\\ud83d": 1}', HALF),
    "halves the wrong way round": ('"\\ude00\\ud83d"', HALF),
    "raw half": ('"\ud83d"', HALF),
    "digits": ('{"a": 1, "n": ' + DIGITS + "}", TOO_LONG),
    "deep": ("[" * 100_000 + "]" * 100_000, BROKEN),
    "a little too deep": ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), BROKEN),
    "deep objects": ('{"a": ' * 200 + "1" + "}" * 200, BROKEN),
    "twice": ('{"a": 1, "b": {"c": 1, "c": 1}}', TWICE),
    "cut off": ('{"a": 1', BROKEN),
    "more behind": ("{} {}", BROKEN),
    "nothing": ("", BROKEN),
    "no UTF-8": (b'{"a": "\xff"}', NO_UTF8),
    "NaN": ('{"a": NaN}', NAN),
    "infinity": ("[-Infinity]", NAN),
    "beyond a float": ("[1e999]", NAN),
}
"""What is not taken, and the kind under which it is refused."""

TAKEN: dict[str, tuple[str | bytes, Any]] = {
    "pair": ('"\\ud83d\\ude00"', "😀"),
    "an escaped backslash": (r'"\\ud83d"', r"\ud83d"),
    "mark": (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
    "digits enough": (f"[{10**100}]", [10**100]),
    "deep enough": ("[" * DEEPEST + "]" * DEEPEST, json.loads("[" * DEEPEST + "]" * DEEPEST)),
    "brackets in a text": ('"' + "[" * 1000 + '"', "[" * 1000),
    "a small float": ("1e-999", 0.0),
    "line separator": ('"a\u2028b"', "a\u2028b"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_has_its_kind(name: str):
    text, kind = REFUSED[name]
    with pytest.raises(BadJson) as caught:
        parse(text)
    assert caught.value.kind == kind and len(str(caught.value)) < 200


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_json_is_taken(name: str):
    text, value = TAKEN[name]
    assert parse(text) == value


def test_numbers_that_are_none_and_keys_twice_are_taken_where_that_is_allowed():
    assert parse('{"a": [NaN, -Infinity, 1e999, 1.5]}', allow_nan=True) == {"a": [None, None, None, 1.5]}
    assert parse('{"a": 1, "a": 2}', allow_duplicates=True) == {"a": 2}
    with pytest.raises(BadJson, match="'a'"):
        parse('{"a": 1, "a": 2}', allow_nan=True)


@pytest.mark.parametrize("name", [name for name, (text, kind) in REFUSED.items() if kind not in (BROKEN, NO_UTF8)])
def test_the_end_of_what_is_refused_is_known_so_that_the_next_one_is_read(name: str):
    text, kind = REFUSED[name]
    assert isinstance(text, str)
    with pytest.raises(BadJson) as caught:
        first_value(f"[{text}, 7]", 1)
    assert (caught.value.kind, caught.value.end) == (kind, 1 + len(text))
    assert first_value(f"[{text}, 7]", 3 + len(text)) == (7, 4 + len(text))


def test_reading_back_makes_a_copy_in_json_s_types():
    value = {"a": (1, 2), 3: {"b": Path("x")}}
    assert as_read_back(value, default=str) == {"a": [1, 2], "3": {"b": "x"}}


def test_a_prompt_with_half_a_character_is_a_prompt_error():
    check_prompt_text("whole 😀")
    with pytest.raises(PromptError, match="half a character"):
        check_prompt_text("half \ud83d")


STRICT = {"run.json": read_json, "hilda.json": lambda path: read_card(path.parent)}
LENIENT = {"config.json": read_model_json, "metrics.jsonl": read_metrics}


@pytest.mark.parametrize("file", [*STRICT, *LENIENT])
@pytest.mark.parametrize("name", REFUSED)
def test_files_are_refused_in_one_line(tmp_path: Path, file: str, name: str):
    text, kind = REFUSED[name]
    if file in LENIENT and kind in (NAN, TWICE) or text in ("", '"\ud83d"'):
        return
    path = tmp_path / file
    path.write_bytes((text if isinstance(text, bytes) else text.encode()) + b"\n")
    with pytest.raises(HildaError, match=file) as caught:
        {**STRICT, **LENIENT}[file](path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(tmp_path))


def test_what_a_program_wrote_for_itself_may_hold_nan(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"a": Infinity, "b": 1, "b": 2}')
    assert read_model_json(tmp_path / "config.json") == {"a": None, "b": 2}
    (tmp_path / "metrics.jsonl").write_text('{"loss": NaN, "text": "a\u2028b"}\n{"loss": 1.0}\n{"los')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"loss": None, "text": "a\u2028b"}, {"loss": 1.0}]


def test_a_mark_before_a_configuration_is_dropped(tmp_path: Path):
    (tmp_path / "run.json").write_bytes(b'\xef\xbb\xbf{"seed": 1}')
    assert read_json(tmp_path / "run.json") == {"seed": 1}


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e999", DIGITS, '{"a": 1, "a": 2}', '"\\ud83d"'])
def test_a_value_of_the_command_line_that_is_not_taken_is_an_error(text: str):
    with pytest.raises(ConfigError, match="cannot be taken") as caught:
        override({}, [f"a.b={text}"])
    assert len(str(caught.value)) < 200


def test_a_value_of_the_command_line_that_is_no_json_is_text():
    assert [read_value(text) for text in ("tiny", "[1", "1", '"1"', "[" * 9999)] == ["tiny", "[1", 1, "1", "[" * 9999]


OWN = {
    "core/json_text.py": "the reader itself",
    "data/control_tokens.py": "what the tokenizer's library says of itself",
    "data/template_": "lines between this program and its worker",
    "detokenization.py": "what the tokenizer's library says of itself",
    "grading/": "processes that may load the standard library alone",
    "jobs/service.py": "what it has just written",
    "jobs/store.py": "columns of its own table",
    "jobs/worker.py": "columns of its own table",
    "models/checkpoint.py": "what Transformers has just written",
    "trainer/state.py": "the state's counters, whose NaN must stay NaN",
}
"""Who reads JSON without the reader, and why."""


def test_nobody_else_reads_json_on_their_own():
    package = Path(hildanext.__file__).parent
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "json"
            if named and node.attr in ("load", "loads", "JSONDecoder", "JSONDecodeError"):
                found.add(path.relative_to(package).as_posix())
    kept = {name for name in found if any(name.startswith(own) for own in OWN)}
    assert found == kept, f"use core.json_text.parse in {sorted(found - kept)}"
    assert all(any(name.startswith(own) for name in found) for own in OWN)
