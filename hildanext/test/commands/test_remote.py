"""hildanext generate --server: what a service writes, shown as if it were written here."""

import json

import pytest

pytest.importorskip("fastapi")

from hildanext.cli import main
from hildanext.data.chat_template import set_template
from hildanext.engine.local import LocalEngineConfig
from hildanext.serve.settings import ServeConfig
from misbehaving import chunk, misbehaving, tells
from serving import live

PROMPT = ["--prompt", "Once upon a time", "--max-new-tokens", "20"]


@pytest.fixture(scope="module")
def address():
    inside = LocalEngineConfig(threads=1, dtype="fp32").open("tiny", "tiny", "for a test")
    set_template(inside.tokenizer, "auto")
    with live(ServeConfig(port=0, jobs_folder=None), inside) as found:
        yield found


def ask(capsys, url, *flags):
    """Exit code, standard output and standard error of one call."""
    code = main(["generate", "--server", url, *flags])
    said = capsys.readouterr()
    return code, said.out, said.err


def here(capsys, *flags):
    assert main(["generate", "--model", "tiny", "--dtype", "fp32", "--threads", "1", *flags]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        PROMPT,
        [*PROMPT, "--mode", "quality", "--tau-edit", "off", "--seed", "4", "--temperature", "0.8"],
        [*PROMPT, "--chat", "--system", "Be kind."],
        [*PROMPT, "--stop", "little", "--effort", "instant"],
    ],
    ids=["plain", "sampled", "chat", "stop"],
)
def test_the_text_is_the_one_written_here(address, capsys, flags):
    code, out, _ = ask(capsys, address, *flags, "--json")
    assert code == 0 and len(out.splitlines()) == 1
    far = json.loads(out)
    set_by = ["--json"]
    if "--chat" not in flags:
        near = json.loads(here(capsys, *flags, *set_by))
        assert far["text"] == near["text"] and far["tokens"] == near["tokens"]
        assert far["decoder"] == near["decoder"] and far["mode"] == near["mode"]
        assert far["stats"]["denoise_forwards"] == near["stats"]["denoise_forwards"] + near["stats"]["revise_forwards"]
    assert far["server"] == address and far["engine"] == "transformers"


def test_text_is_streamed_and_its_cost_told(address, capsys):
    code, out, _ = ask(capsys, address, *PROMPT)
    assert code == 0 and out.startswith("Once upon a time, there was")
    assert "20 tokens; first text after" in out.splitlines()[-1] and "tokens per forward" in out.splitlines()[-1]


def test_a_trace_shows_every_forward_and_is_the_one_kept_here(address, capsys, tmp_path):
    far, near = tmp_path / "far.json", tmp_path / "near.json"
    code, out, _ = ask(capsys, address, *PROMPT, "--trace", str(far))
    shown = here(capsys, *PROMPT, "--trace", str(near))

    def pictures(text):
        return text[: text.rindex("Once upon a time, there")]

    assert code == 0 and "final |" in out and pictures(out) == pictures(shown)
    steps = [json.loads(file.read_text())["rows"][0]["steps"] for file in (far, near)]
    assert steps[0] == steps[1] and len(steps[0]) > 3


def test_a_file_of_prompts_comes_back_in_its_order(address, capsys, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"Tom {word}" for word in ("saw", "ran", "ate", "is") * 3), encoding="utf-8")
    code, out, _ = ask(capsys, address, "--batch", str(file), "--max-new-tokens", "6", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["prompt"] for row in rows] == file.read_text().splitlines()
    assert rows[0]["text"] == rows[4]["text"]


def test_any_other_server_writes_plain_text(capsys, monkeypatch):
    monkeypatch.setenv("HILDA_API_KEY", "secret")
    with misbehaving(tells) as server:
        code, out, _ = ask(capsys, server.url, "--prompt", "zero ")
        assert code == 0 and "zero one two three\n" in out and "forwards" not in out
        assert server.asked[0][2]["Authorization"] == "Bearer secret"
        code, out, err = ask(capsys, server.url, "--prompt", "a", "--trace", "t.json", "--json")
        assert code == 2 and "cannot be asked for stream_denoising" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--device", "cpu"], "--device is about a model here"),
        (["--threads", "2"], "--threads is about a model here"),
        (["--system", "x"], "add --chat"),
        (["--model", "large"], "has no model 'large'"),
        (["--tau-mask", "3"], "tau_mask"),
        (["--batch", "absent.txt"], "cannot read"),
    ],
)
def test_what_makes_no_sense_is_one_line(capsys, flags, words):
    with misbehaving(tells) as server:
        code, _, err = ask(capsys, server.url, *flags)
    assert code == 2 and words in err and len(err.splitlines()) == 1 and not server.asked


def test_a_stream_that_breaks_is_one_line_after_the_text(capsys):
    def act(handler, body):
        handler.begin()
        handler.say(chunk("one "))
        handler.cut()

    with misbehaving(act) as server:
        code, out, err = ask(capsys, server.url, "--prompt", "zero ")
    assert code == 2 and out == "zero one \n" and len(err.splitlines()) == 1
    code, _, err = ask(capsys, server.url, "--prompt", "a")
    assert code == 2 and "no server answers" in err


def test_a_wrong_key_says_where_keys_come_from(capsys, monkeypatch):
    monkeypatch.setenv("HILDA_API_KEY", "guess")
    monkeypatch.setenv("OTHER", "right")
    inside = LocalEngineConfig(threads=1, dtype="fp32").open("tiny", None, "for a test")
    with live(ServeConfig(port=0, jobs_folder=None, api_key_env="OTHER"), inside) as url:
        code, _, err = ask(capsys, url, *PROMPT)
        assert code == 2 and "refuses the key" in err and "guess" not in err
        monkeypatch.setenv("HILDA_API_KEY", "right")
        assert ask(capsys, url, *PROMPT)[0] == 0
