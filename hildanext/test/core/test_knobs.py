"""Knobs read from the source of a family that nobody imports, and the flags that are made of them."""

import argparse

import pytest

from hildanext.commands import generation_flags
from hildanext.core.knobs import Knob, knobs_in, names_in

FRONT = """
from family.base import Member
from family.one import One
from family.two import Second as Two
from family.none import Bare

MEMBERS: dict[str, type[Member]] = {"one": One, "two": Two, "bare": Bare}
"""
ONE = '''
from typing import ClassVar
raise RuntimeError("read, never imported")

class Helper:
    other: int = 1

class One:
    """A member."""
    research: ClassVar[bool] = True
    shared: float = Field(title="x", default=0.5, ge=0, lt=1)
    """How much
    of it, in %."""
    limit: int | None = Field(default=None, gt=0, le=9)
    eager: bool = False
    many: tuple[int, ...] = ()
    word: str | int
    LATER = 3

    def run(self) -> None:
        inner: int = 1
'''
TWO = '''
class Second:
    shared: int = 3
    """Another."""
    own: float | None = None
    """Its own."""
'''


@pytest.fixture
def package(tmp_path):
    for name, text in {"__init__": FRONT, "one": ONE, "two": TWO, "none": "class Bare: ..."}.items():
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def test_each_member_s_knobs_are_read_with_type_bounds_and_text(package):
    assert names_in(package, "MEMBERS") == ("one", "two", "bare")
    assert knobs_in(package, "MEMBERS") == {
        "one": (
            Knob("shared", "float", False, 0.5, {"ge": 0, "lt": 1}, "How much of it, in %."),
            Knob("limit", "int", True, None, {"gt": 0, "le": 9}, ""),
            Knob("eager", "bool", False, False, {}, ""),
            Knob("many", "tuple[int, ...]", False, (), {}, ""),
            Knob("word", "str | int", False, None, {}, ""),
        ),
        "two": (
            Knob("shared", "int", False, 3, {}, "Another."),
            Knob("own", "float", True, None, {}, "Its own."),
        ),
        "bare": (),
    }


@pytest.fixture
def parser(package, monkeypatch):
    monkeypatch.setattr(generation_flags, "DECODING", package)
    monkeypatch.setattr(generation_flags, "knobs_in", lambda place, _: knobs_in(place, "MEMBERS"))
    parser = argparse.ArgumentParser()
    parser.add_argument("--limit", type=int)
    generation_flags.add_decoder_flags(parser)
    return parser


def test_a_name_that_is_a_flag_already_makes_none(parser):
    """Of two members the first one's: its value goes to whichever is asked for. Of a verb the verb's own."""
    text = parser.format_help()
    assert [text.count(f"--{name} ") for name in ("shared", "own", "limit", "word")] == [2, 2, 2, 2]
    assert "How much of it, in %." in " ".join(text.split()) and "Another." not in text
    assert parser.parse_args(["--limit", "3"]).limit == 3


def test_flags_give_pairs_and_off_where_none_is_a_value(parser):
    given = ["--shared", "0.25", "--own", "off", "--eager", "--word", "plain", "--many", "[1, 2]"]
    expected = [("shared", 0.25), ("own", "off"), ("eager", True), ("word", "plain"), ("many", [1, 2])]
    assert parser.parse_args(given).knobs == expected
    assert "--own FLOAT or off" in parser.format_help() and "--eager [BOOL]" in parser.format_help()
