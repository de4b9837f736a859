"""A program that answers lines: what Ctrl-C of whoever asks does to it, and what of an answer nobody waited for."""

import os
import signal
import threading

import pytest

from hildanext.core.line_program import LineProgram

pytestmark = pytest.mark.usefixtures("hears_ctrl_c")

PROGRAM = """
import sys, time
print("ready", flush=True)
for line in sys.stdin:
    word = line.strip()
    time.sleep(0.5 if word == "slow" else 0)
    print(word, flush=True)
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return LineProgram(path, 60.0)


def test_it_answers_and_lives_on(program):
    assert [program.ask(word, 60.0) for word in ("one", "two")] == ["one\n", "two\n"]


@pytest.mark.skipif(os.name == "nt", reason="signals differ there")
def test_a_question_that_was_interrupted_answers_no_other(program):
    assert program.ask("one", 60.0) == "one\n"
    clock = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    clock.start()
    with pytest.raises(KeyboardInterrupt):
        program.ask("slow", 60.0)
    assert program.ask("two", 60.0) == "two\n"


@pytest.mark.skipif(os.name == "nt", reason="groups of processes differ there")
def test_a_terminal_s_ctrl_c_is_not_the_program_s(program):
    assert program.ask("one", 60.0) == "one\n"
    assert os.getpgid(program._process.pid) != os.getpgid(0)


def test_a_late_answer_is_none_and_the_next_is_right(program):
    assert program.ask("slow", 0.1) is None
    assert program.ask("two", 60.0) == "two\n"
