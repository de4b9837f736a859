"""The line that a person watches: paces, names, what a resumed run has done, and silence where it is asked for."""

import pytest

from hildanext.core import progress
from hildanext.core.progress import InputShare, ProgressLine, Repeats, time_left


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_the_first_line_at_once_then_now_and_then_and_one_at_the_end(clock, capsys):
    with ProgressLine(100, "tokens") as line:
        for done in (10, 20, 30, 40):
            clock(8)
            line.update(done, f"loss {done}")
        clock(1)
        line.update(100, "loss 1")
    shown = capsys.readouterr().err.splitlines()
    assert shown == [
        "10 of 100 tokens | loss 10 | 72 s left",
        "40 of 100 tokens | loss 40 | 48 s left",
        "100 of 100 tokens | loss 1 | 0 s left",
    ]


def test_evaluations_are_not_the_pace_of_steps_and_are_counted_in_what_is_left(clock, capsys):
    with ProgressLine(100, "tokens") as line:
        line.breaks_left = 2
        clock(10)
        line.update(10, "a")  # 90 more at one a second
        with line.evaluation():
            clock(30)
        line.breaks_left = 1
        clock(20)
        line.update(40, "b")
    assert capsys.readouterr().err.splitlines() == [
        "10 of 100 tokens | a | 90 s and 2 evaluations left",
        "40 of 100 tokens | b | 75 s left",
    ]


def test_what_takes_hours_is_told_in_hours():
    assert [progress.duration(seconds) for seconds in (0.4, 119.0, 120.0, 3600.0, 7199.0, 20_000.0)] == [
        "0 s", "119 s", "2 min", "60 min", "2 h 0 min", "5 h 33 min",
    ]  # fmt: skip


def test_what_earlier_sessions_did_counts_for_the_bar_and_not_for_the_pace(clock, capsys):
    with ProgressLine(10, "answers", "gsm8k, S_MODE", done=6) as line:
        clock(30)
        line.advance(60)
        clock(30)
        line.advance(60)
    assert capsys.readouterr().err.splitlines() == [
        "7 of 10 answers | gsm8k, S_MODE | 2 tokens/s | 90 s left",
        "8 of 10 answers | gsm8k, S_MODE | 2 tokens/s | 60 s left",
    ]


def test_text_is_shown_as_it_is_and_in_one_piece(capsys):
    sample = "[bold]a sample[/] " + "word " * 60 + "end"
    with ProgressLine(1, "tokens") as line:
        line.say(sample)
    assert capsys.readouterr().err == sample + "\n"


def test_a_quiet_one_says_nothing(capsys):
    with ProgressLine(1, "tokens", quiet=True) as line:
        line.say("a")
        line.advance(1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("seconds", "said"), [(59.0, ""), (600.0, ", 10 min left"), (9000.0, ", 2 h 30 min left")])
def test_more_than_a_minute_is_told_and_less_is_not(seconds, said):
    assert time_left(seconds) == said


def test_repeats_say_how_long_the_others_will_take(monkeypatch):
    clock, said = iter([0.0, 300.0, 400.0]), []
    monkeypatch.setattr("hildanext.core.progress.time.perf_counter", lambda: next(clock))
    repeats = Repeats(3, said.append)
    repeats.done(1)
    repeats.done(3)
    assert said == ["repeat 1 of 3, 10 min left", "repeat 3 of 3"]


def test_the_time_that_an_input_takes_is_told_early_and_once_a_minute() -> None:
    now, told = [0.0], list[str]()
    share = InputShare(told.append, lambda: now[0])
    for second in range(200):
        now[0] = float(second)
        share.reached(0.2 + second / 1000)  # a fifth was read by another session
    assert told == ["20% read, 13 min left", "26% read, 12 min left", "32% read, 11 min left", "38% read, 10 min left"]
    share.reached(0.0)  # another input
    assert share.left() == ""
    now[0] += 1.0
    share.reached(0.5)
    assert share.left() == "" and len(told) == 4, "a minute or less is not worth a word"
