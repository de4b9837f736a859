"""Files of prompts: where a line ends, what is no prompt, and what is refused with its line."""

import json
from pathlib import Path

import pytest

from hildanext.core.errors import DataError
from hildanext.data.prompts import read_prompts

TEXTS: dict[str, tuple[bytes, list[tuple[int, str]]]] = {
    "breaks that end no line": (
        "The dog\u2028The cat\nLily\fhas\n\nOn\x0bce\x85a\rb\n".encode(),
        [(1, "The dog\u2028The cat"), (2, "Lily\fhas"), (4, "On\x0bce\x85a\rb")],
    ),
    "mark and carriage returns": (b"\xef\xbb\xbfThe dog\r\nThe fox\r\n", [(1, "The dog"), (2, "The fox")]),
    "no end": (b"a\nb", [(1, "a"), (2, "b")]),
    "spaces stay, a blank line is none": (b" a \n \t\n\r\nb\n", [(1, " a "), (4, "b")]),
    "a mark inside is text": ("a\n\ufeffb\n".encode(), [(1, "a"), (2, "\ufeffb")]),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_line_ends_at_a_line_feed_alone(tmp_path: Path, name: str):
    raw, wanted = TEXTS[name]
    (tmp_path / "p.txt").write_bytes(raw)
    assert [(prompt.line, prompt.text) for prompt in read_prompts(tmp_path / "p.txt")] == wanted


def test_blank_lines_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "p.txt").write_bytes(b"a\n\n \nb\n")
    read_prompts(tmp_path / "p.txt")
    assert "blank lines skipped: 2" in caplog.text
    caplog.clear()
    (tmp_path / "p.txt").write_bytes(b"a\nb\n")
    read_prompts(tmp_path / "p.txt")
    assert not caplog.text


def test_json_lines_keep_their_breaks_and_lose_their_mark(tmp_path: Path):
    lines = ['"a\u2028b"', json.dumps({"prompt": "c", "more": 1, "system": None, "tools": []})]
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert [prompt.text for prompt in read_prompts(tmp_path / "p.jsonl")] == ["a\u2028b", "c"]


def turn(**more: object) -> str:
    return json.dumps({"messages": [{"role": "user", "content": "Hi", **more}]})


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("p.txt", b"fine\n\xff\n", "no UTF-8 .at byte 5"),
        ("p.txt", b"\xef\xbb\xbf\n \n", "no prompts"),
        ("p.jsonl", b'"a"\n"\\ud83d"\n', "line 2: half of a surrogate pair"),
        ("p.jsonl", b'\n{"prompt": "a", "n": ' + b"9" * 5000 + b"}\n", "line 2: a number of thousands of digits"),
        ("p.jsonl", b'{"prompt": "a", "prompt": "b"}\n', "line 1: a key twice"),
        ("p.jsonl", b'{"prompt": "a", "n": NaN}\n', "line 1: NaN"),
        ("p.jsonl", b'{"prompt": "a", "system": "Be brief."}\n', "line 1: nobody reads 'system'"),
        ("p.jsonl", turn(name="Lily").encode(), "line 1: nobody reads the key 'name'"),
        ("p.jsonl", turn(tool_calls=[{"id": "x"}]).encode(), "line 1: nobody reads the key 'tool_calls'"),
    ],
)
def test_what_is_no_prompt_is_refused_in_one_line(tmp_path: Path, name: str, raw: bytes, said: str):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=said) as caught:
        read_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_keys_that_say_nothing_are_taken(tmp_path: Path):
    (tmp_path / "p.jsonl").write_text(turn(weight=1, refusal=None, tool_calls=[], annotations=[], id="x") + "\n")
    assert read_prompts(tmp_path / "p.jsonl")[0].messages == (("user", "Hi"),)
