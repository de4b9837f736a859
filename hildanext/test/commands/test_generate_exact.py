"""`generate`, `chat` and Python in exact mode: the parent's text, what is told of it, and errors of one line."""

import json

import pytest

import hildanext
from exact_stubs import tiny_drafts
from hildanext.ar import Parent
from hildanext.cli import main
from hildanext.core.errors import ConfigError
from hildanext.core.json_text import parse
from hildanext.models.draft_card import CARD
from hildanext.models.loading.load import load_parent
from hildanext.tokenization import encode_prompt

SHARED = ["--dtype", "fp32", "--threads", "1", "--max-new-tokens", "16"]
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def drafts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HILDANEXT_HOME", str(folder / "home"))
        yield str(tiny_drafts(folder / "drafts"))


@pytest.fixture(scope="module")
def parents_text() -> str:
    causal_lm, tokenizer = load_parent("tiny")
    return Parent(causal_lm, tokenizer).generate(encode_prompt(tokenizer, PROMPT), 16).text


@pytest.mark.parametrize(
    "flags",
    [["--after", "all"], ["--mode", "exact", "--drafter", "both", "--drafts", "2"], ["--drafter", "none"]],
    ids=str,
)
def test_the_text_is_the_parents_and_the_last_line_says_what_it_cost(drafts, parents_text, capsys, flags):
    assert main(["generate", "--model", drafts, "--prompt", PROMPT, *flags, *SHARED]) == 0
    text, _, line = capsys.readouterr().out.partition("\n\n")
    assert text == PROMPT + parents_text
    assert "tokens per forward" in line and "rows per forward" in line and "drafts confirmed" in line
    assert "block" not in line and line.rstrip().endswith("exact]")


def test_a_parent_without_adapters_drafts_from_the_text(drafts, parents_text, capsys):
    flags = ["--mode", "exact", "--model", "tiny", "--drafter", "ngram", "--json"]
    assert main(["generate", "--prompt", PROMPT, *flags, *SHARED]) == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (
        row["text"] == parents_text and row["mode"] == "exact" and {"rows", "drafted", "confirmed"} <= set(row["stats"])
    )


def test_a_trace_shows_an_edit_as_the_draft_and_the_parents_token(drafts, capsys, tmp_path):
    file = tmp_path / "trace.json"
    assert (
        main(["generate", "--model", drafts, "--prompt", PROMPT, "--after", "all", "--trace", str(file), *SHARED]) == 0
    )
    steps = parse(file.read_bytes())["rows"][0]["steps"]
    edit = next(step["edits"][0] for step in steps if step["edits"])
    assert f"[{edit['old_text']} →]{edit['new_text']}".replace("\n", "⏎") in capsys.readouterr().out


def test_python_has_the_same(drafts, parents_text):
    model = hildanext.load(drafts, dtype="fp32", threads=1)
    assert hildanext.generate(model, PROMPT, max_new_tokens=16, decoder={"after": "last"}).text == parents_text
    assert "".join(hildanext.stream(model, PROMPT, mode="exact", max_new_tokens=16)) == parents_text
    with pytest.raises(ConfigError, match="is for diffusion models"):
        hildanext.generate(model, PROMPT, mode="S_MODE")
    with pytest.raises(ConfigError, match='load it with mode="exact"'):
        hildanext.generate(hildanext.load("tiny", threads=1), PROMPT, mode="exact")
    bare = hildanext.load("tiny", dtype="fp32", threads=1, mode="exact")
    assert hildanext.generate(bare, PROMPT, max_new_tokens=16, decoder={"drafter": "ngram"}).text == parents_text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "smollm2-135m"], "'smollm2-135m' has no draft adapters: train them"),
        (["--model", "DRAFTS", "--drafts", "4"], "drafts 4, and the adapters have learnt 3: ask for 1 to 3 drafts"),
        (["--model", "DRAFTS", "--drafter", "someone"], "'someone' is no choice"),
        (["--model", "DRAFTS", "--tau-mask", "0.3"], "unknown key 'tau_mask'"),
        (["--model", "DRAFTS", "--effort", "low"], "efforts lie over the modes of a diffusion model"),
        (["--model", "DRAFTS", "--sample-drafts"], "sample_drafts at temperature 0 draws nothing"),
        (["--model", "DIFFUSION"], "keeps no parent to be exact to: give draft adapters"),
        (["--model", "DRAFTS", "--max-new-tokens", "9999"], "exceed the context"),
        (["--model", "OTHER"], "are of another parent than 'tiny'"),
    ],
)
def test_what_cannot_be_is_one_line(drafts, flags, message, tmp_path, capsys):
    other = tmp_path / "other"
    if "OTHER" in flags:
        other.mkdir()
        card = parse((tiny_drafts(tmp_path / "made") / CARD).read_bytes())
        (other / CARD).write_text(json.dumps({**card, "parent_hash": "0" * 64}))
    diffusion = str(hildanext.__path__[0]) + "/assets/tiny/diffusion"
    names = {"DRAFTS": drafts, "OTHER": str(other), "DIFFUSION": diffusion}
    flags = [names.get(flag, flag) for flag in flags]
    assert main(["generate", "--mode", "exact", "--prompt", PROMPT, *flags]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said


def test_a_parent_is_named_for_drafts_alone(capsys):
    assert main(["generate", "--prompt", PROMPT, "--parent", "tiny"]) == 2
    assert "--parent is about draft adapters" in capsys.readouterr().err
