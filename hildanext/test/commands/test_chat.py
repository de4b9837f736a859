"""The chat verb with scripted input: what it streams, its commands, and what ends an answer or the conversation."""

import io
import json
import os
import signal
import time
from contextlib import closing

import pytest

pytest.importorskip("fastapi")

from hildanext.cli import main
from hildanext.commands import chat
from hildanext.data.chat_template import Message, set_template
from hildanext.engine import base
from hildanext.engine.base import Failed, Finished, Piece, Started
from hildanext.engine.local import LocalEngineConfig
from hildanext.serve.settings import ServeConfig
from misbehaving import misbehaving
from serving import ScriptedEngine, answer, live

pytestmark = pytest.mark.usefixtures("hears_ctrl_c")

HERE = ["--dtype", "fp32", "--threads", "1", "--max-new-tokens", "12"]


class Typed(io.StringIO):
    """Lines as from a terminal."""

    def isatty(self) -> bool:
        return True


def talk(capsys, monkeypatch, said, *flags, typed=False):
    """Exit code, standard output and standard error of one conversation."""
    monkeypatch.setattr("sys.stdin", (Typed if typed else io.StringIO)(said))
    code = main(["chat", *flags])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def scripted(monkeypatch, act=None):
    """An engine that does as it is told, in place of a model."""
    engine = ScriptedEngine(act)
    monkeypatch.setattr(chat, "_open", lambda options, asked: (engine, lambda answer, asked: "[numbers]"))
    return engine


def test_a_piped_conversation_is_answered_turn_by_turn_and_shows_no_prompt(capsys, monkeypatch):
    engine = scripted(monkeypatch)
    code, out, err = talk(capsys, monkeypatch, "\ufeffHello\r\n\n  \nAnd now?", "--seed", "5", "--system", "Be kind.")
    assert code == 0 and not err and out == "well\n\n[numbers]\n\n" * 2
    told = Message("system", "Be kind.")
    first = (told, Message("user", "Hello"))
    second = (*first, Message("assistant", "well"), Message("user", "And now?"))
    assert [request.messages for request in engine.requests] == [first, second]
    assert [request.seed for request in engine.requests] == [5, 6] and engine.closed_with


def test_the_embedded_model_answers_with_the_numbers_of_generate(capsys, monkeypatch):
    code, out, err = talk(capsys, monkeypatch, "Tom has a dog.\n/mode quality\nAnd a cat?\n", *HERE)
    assert code == 0 and not err
    lines = out.splitlines()
    numbers = [line for line in lines if line.startswith("[")]
    assert len(numbers) == 2 and "float32 on cpu, 1 threads; block 8; tau_mask 0.5" in numbers[0]
    assert "tau_mask 0.7, tau_edit 0.5" in numbers[1] and "Q_MODE (published as quality)" in lines


def test_a_server_answers_as_the_model_does_here(capsys, monkeypatch):
    said = "Tom has a dog.\nAnd a cat?\n"
    near = talk(capsys, monkeypatch, said, *HERE)[1]
    inside = LocalEngineConfig(threads=1, dtype="fp32").open("tiny", None, "for a test")
    set_template(inside.tokenizer, "auto")
    with live(ServeConfig(port=0, jobs_folder=None), inside) as url:
        code, far, err = talk(capsys, monkeypatch, said, "--server", url, "--max-new-tokens", "12")
    assert code == 0 and not err and f"tiny at {url}" in far

    def texts(out):
        return [line for line in out.splitlines() if line and not line.startswith("[")]

    assert texts(near) == texts(far) != []


def answers(handler, body):
    """A chat's answer of two pieces, as OpenAI's protocol has it."""
    handler.begin()
    for piece, finish in (("one ", None), ("two", None), ("", "stop")):
        handler.say({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": finish}]})
    handler.say({"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 2}}, b"data: [DONE]\n\n")


def test_any_other_server_is_sent_the_whole_conversation(capsys, monkeypatch):
    with misbehaving(answers) as server:
        code, out, _ = talk(capsys, monkeypatch, "hello\nagain\n", "--server", server.url)
    assert code == 0 and out.count("one two\n") == 2
    sent = [(turn["role"], turn["content"]) for turn in server.asked[-1][1]["messages"]]
    assert sent == [("user", "hello"), ("assistant", "one two"), ("user", "again")]


def test_commands_say_keep_and_forget_what_was_said(capsys, monkeypatch, tmp_path):
    engine, file = scripted(monkeypatch), tmp_path / "talk.jsonl"
    said = [
        "/mode", "/mode speed", "/system Be brief.", "one", f"/save {file}", "//two", f"/save {file}", "/history",
        "/reset", "/system", "three", "/history", "/quit", "never",
    ]  # fmt: skip
    code, out, _ = talk(capsys, monkeypatch, "\n".join(said))
    assert code == 0 and out.count("S_MODE (published as speed)") == 2
    assert "system: Be brief.\nuser: one\nassistant: well\nuser: /two\nassistant: well\nforgotten\n" in out
    assert out.endswith("user: three\nassistant: well\n")
    (line,) = file.read_text(encoding="utf-8").splitlines()
    turns = json.loads(line)["messages"]
    assert [turn["content"] for turn in turns] == ["Be brief.", "one", "well", "/two", "well"]
    assert engine.requests[-1].messages == (Message("user", "three"),) and len(engine.requests) == 3


def test_what_was_saved_is_a_prompt_of_generate(capsys, monkeypatch, tmp_path):
    from hildanext.data.prompts import read_prompts

    scripted(monkeypatch)
    file = tmp_path / "talk.jsonl"
    assert talk(capsys, monkeypatch, f"one\n/save {file}\n")[0] == 0
    assert read_prompts(file)[0].messages == (("user", "one"), ("assistant", "well"))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("/mode quick", "unknown mode 'quick'"),
        ("/sav x", "did you mean '/save'"),
        ("/reset now", "/reset takes nothing"),
        ("/save", "/save needs a file"),
        ("/save talk.jsonl", "no conversation to save"),
        ("one\n/save there.jsonl", "there already"),
        ("half \udcff", "half a character"),
        ("/system half \udcff", "half a character"),
    ],
)
def test_what_makes_no_sense_is_a_line_at_a_terminal_and_the_end_of_a_pipe(said, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.jsonl").write_text("kept")
    engine = scripted(monkeypatch)
    code, _, err = talk(capsys, monkeypatch, f"{said}\nlast\n", typed=True)
    assert code == 0 and words in err and err.count("\n") == 1 and err.startswith("error: ")
    assert engine.requests[-1].messages[-1] == Message("user", "last")
    engine = scripted(monkeypatch)
    code, _, err = talk(capsys, monkeypatch, f"{said}\nlast\n")
    assert code == 2 and words in err and err.count("\n") == 1
    assert all(request.messages[-1].content != "last" for request in engine.requests)
    assert (tmp_path / "there.jsonl").read_text() == "kept"


def interrupt(request, sink):
    """Half an answer, then Ctrl-C from the terminal."""
    sink(Started(1, 0, 0.0))
    if request.messages[-1].content == "stop":
        sink(Piece("half"))
        time.sleep(0.2)  # until it is on the screen
        os.kill(os.getpid(), signal.SIGINT)
        return
    sink(Piece("whole"))
    sink(Finished(answer("whole")))


@pytest.mark.skipif(os.name == "nt", reason="signals differ there")
def test_ctrl_c_stops_the_answer_and_keeps_what_came_of_it(capsys, monkeypatch):
    engine = scripted(monkeypatch, interrupt)
    code, out, _ = talk(capsys, monkeypatch, "stop\nagain\n/history\n", typed=True)
    assert code == 0 and "half\n[stopped]\n" in out and len(engine.cancelled) == 1
    assert "user: stop\nassistant: half\nuser: again\nassistant: whole\n" in out


@pytest.mark.skipif(os.name == "nt", reason="signals differ there")
def test_ctrl_c_ends_a_piped_conversation(capsys, monkeypatch):
    engine = scripted(monkeypatch, interrupt)
    assert talk(capsys, monkeypatch, "stop\nagain\n")[0] == 130
    assert len(engine.requests) == len(engine.cancelled) == 1 and engine.closed_with


def test_ctrl_c_at_the_prompt_says_how_to_end(capsys, monkeypatch):
    lines = iter([KeyboardInterrupt(), EOFError()])

    def read(prompt):
        raise next(lines)

    scripted(monkeypatch)
    monkeypatch.setattr("builtins.input", read)
    code, out, _ = talk(capsys, monkeypatch, "", typed=True)
    assert code == 0 and "/quit or Ctrl-D ends" in out


@pytest.mark.skipif(os.name == "nt", reason="signals differ there")
def test_our_engine_lets_go_of_an_answer_that_was_stopped(capsys, monkeypatch):
    whole, cancelled = base.stream, []

    def interrupted(engine, request):
        if request.messages[-1].content == "again":
            late = time.monotonic() + 20
            while not engine.load().finished["cancelled"] and time.monotonic() < late:
                time.sleep(0.01)
            cancelled.append(engine.load().finished["cancelled"])
            yield Finished(answer(""))
            return
        with closing(whole(engine, request)) as events:
            for event in events:
                yield event
                if isinstance(event, Piece):
                    os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(base, "stream", interrupted)
    endless = ["--max-new-tokens", "900", "--set", "generation.ignore_eos=true"]
    code, out, _ = talk(capsys, monkeypatch, "stop\nagain\n/history\n", *HERE[:4], *endless, typed=True)
    assert code == 0 and out.count("[stopped]") == 1 and "user: stop\nassistant: " in out and cancelled == [1]


def test_an_answer_that_fails_is_no_turn(capsys, monkeypatch):
    from hildanext.core.errors import PromptError

    def act(request, sink):
        sink(Piece("half"))
        sink(Failed(PromptError("too long", "shorten it")))

    scripted(monkeypatch, act)
    code, out, err = talk(capsys, monkeypatch, "one\n/history\n", typed=True)
    assert code == 0 and "half\n" in out and "user:" not in out and err == "error: too long: shorten it\n"


def test_a_conversation_beyond_the_context_says_how_to_begin_anew(capsys, monkeypatch):
    long = "Tom has a dog and a cat. " * 400
    code, _, err = talk(capsys, monkeypatch, f"Hello\n{long}\nBye\n", *HERE, typed=True)
    assert code == 0 and "/reset begins anew" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "tiny"], "'tiny' has no chat template: add --plain"),
        (["--server", "http://127.0.0.1:9", "--plain"], "--plain is about a model here"),
        (["--server", "http://127.0.0.1:9", "--device", "cpu"], "--device is about a model here"),
        (["--set", 'generate.modes=["S_MODE","Q_MODE"]'], "chat is about one mode"),
        (["--set", "generation.cached=false"], "generation.cached"),
        (["--set", "generate.mode=S_MODE"], "did you mean 'modes'"),
        (["--tau-mask", "3"], "tau_mask"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_2(flags, words, capsys, monkeypatch):
    code, _, err = talk(capsys, monkeypatch, "Hello\n", *flags)
    assert code == 2 and words in err and err.count("\n") == 1


def test_plain_turns_for_a_named_model_without_a_template(capsys, monkeypatch):
    assert talk(capsys, monkeypatch, "Hello\n", "--model", "tiny", "--plain", *HERE)[0] == 0


def test_a_terminal_sees_who_answers_and_a_prompt(capsys, monkeypatch):
    scripted(monkeypatch)
    code, out, _ = talk(capsys, monkeypatch, "/help\nHello\n", typed=True)
    assert code == 0 and out.startswith("scripted, S_MODE (published as speed); /help lists commands")
    assert all(command in out for command in ("/reset", "/mode", "/system", "/history", "/save", "/help", "/quit"))
    assert out.count(chat.PROMPT) == 3
