"""The generate verb, in process: what it streams, what it prints, what it refuses."""

import json

import pytest
from rich.console import Console

from decoding_stubs import StubTokenizer
from hildanext.cli import main
from hildanext.decoding.state import Step
from hildanext.decoding.trace import TerminalView, step_record
from hildanext.detokenization import TokenCells
from hildanext.models.checkpoint import save_diffusion
from hildanext.models.start import start_conversion
from hildanext.tokenization import encode_prompt
from small_models import small_parent, small_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random diffusion checkpoint with block 4 and a context of 96."""
    folder = tmp_path_factory.mktemp("models")
    save_diffusion(folder / "diffusion", *start_conversion(small_parent(folder / "parent"), "parent", 4))
    return str(folder / "diffusion")


def call(checkpoint, *flags):
    common = ["--model", checkpoint, "--max-new-tokens", "12", "--dtype", "fp32", "--threads", "1"]
    return main(["generate", *common, *flags])


def test_it_streams_the_prompt_the_text_and_one_line_of_numbers(checkpoint, capsys):
    assert call(checkpoint, "--prompt", "w1 w2 w3", "--mode", "S_MODE") == 0
    out = capsys.readouterr().out
    assert out.startswith("w1 w2 w3")
    line = out.strip().splitlines()[-1]
    for part in ("tokens/s", "forwards (", "tokens per forward", "edits", "float32 on cpu", "1 threads", "block 4"):
        assert part in line
    assert "tau_mask 0.5, tau_edit 0.0" in line and "S_MODE" in line and "speed" in line


def test_json_is_one_object_with_the_settings_that_made_it(checkpoint, capsys):
    assert call(checkpoint, "--prompt", "w1", "--mode", "quality", "--tau-edit", "off", "--json", "--top-k", "5") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["decoder"] | {"tau_edit": None, "tau_mask": 0.7, "top_k": 5} == record["decoder"]
    stats = record["stats"]
    kinds = ("prefill", "denoise", "commit", "revise")
    assert stats["forwards"] == sum(stats[f"{kind}_forwards"] for kind in kinds) > 0
    assert len(record["tokens"]) == stats["tokens"] and record["dtype"] == "float32"


def test_the_same_seed_gives_the_same_text(checkpoint, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        assert call(checkpoint, "--prompt", "w5", "--temperature", "1.5", "--seed", seed, "--json") == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1] != texts[2]


def test_a_cache_that_drops_is_asked_for_under_full_alone(checkpoint, capsys):
    asked = ["--prompt", "w1 w2 w3", "--json", "--set"]
    cache = 'generation.cache={"name": "knorm", "ratio": 0.5}'
    assert call(checkpoint, *asked, cache) == 2
    said = capsys.readouterr().err
    assert "'knorm' is a FULL method" in said and len(said.strip().splitlines()) == 1
    assert call(checkpoint, *asked, cache, "--set", "profile=FULL") == 0
    assert json.loads(capsys.readouterr().out)["stats"]["tokens"] == 12
    assert call(checkpoint, *asked, "generation.cache=h2o", "--set", "profile=FULL") == 2
    assert "unknown cache 'h2o'" in capsys.readouterr().err


def test_a_trace_is_shown_and_saved(checkpoint, capsys, tmp_path):
    assert call(checkpoint, "--prompt", "w1 w2", "--trace", str(tmp_path / "trace.json")) == 0
    assert "masks" in capsys.readouterr().out
    saved = json.loads((tmp_path / "trace.json").read_text())
    steps = saved["rows"][0]["steps"]
    assert len(steps) == saved["rows"][0]["stats"]["denoise_forwards"]
    assert {"masks", "drafts", "edits", "final", "probability"} <= set(steps[0]) | set(steps[0]["drafts"][0])


def test_a_trace_that_cannot_be_kept_is_refused_before_anything_is_written(checkpoint, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for place, said in ((tmp_path, "Is a directory"), (tmp_path / "file" / "trace.json", "cannot write")):
        assert call(checkpoint, "--prompt", "w1 w2", "--trace", str(place)) == 2
        printed = capsys.readouterr()
        assert said in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_trace_without_a_file_is_shown_and_nothing_is_written(checkpoint, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(checkpoint, "--prompt", "w1 w2", "--trace") == 0
    printed = capsys.readouterr()
    assert "masks" in printed.out and "trace:" not in printed.err and not list(tmp_path.iterdir())
    assert call(checkpoint, "--prompt", "w1 w2", "--trace", "--json") == 2
    assert "--trace FILE" in capsys.readouterr().err


def test_a_batch_of_prompts_keeps_their_order(checkpoint, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("w1 w2 w3 w4 w5\n\nw7\n")
    assert call(checkpoint, "--batch", str(tmp_path / "prompts.txt"), "--json") == 0
    together = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["prompt"] for record in together] == ["w1 w2 w3 w4 w5", "w7"]
    assert call(checkpoint, "--prompt", "w7", "--json") == 0
    assert json.loads(capsys.readouterr().out)["text"] == together[1]["text"]


def test_the_run_s_sections_lie_between_the_mode_and_the_flags(checkpoint, capsys):
    flags = ["--set", "decoder.tau_mask=0.6", "--set", "decoder.max_post=3", "--max-post", "1"]
    assert call(checkpoint, "--prompt", "w1", "--json", *flags) == 0
    decoder = json.loads(capsys.readouterr().out)["decoder"]
    assert (decoder["tau_mask"], decoder["tau_edit"], decoder["max_post"]) == (0.6, 0.0, 1)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--tau-mask", "1.5"], "tau_mask: 1.5 is above 1, give 0 to 1"),
        (["--tau-mask", "abc"], "tau_mask: 'abc' is no number, give 0 to 1"),
        (["--tau-edit", "-1"], "tau_edit: -1 is below 0, give 0 to 1, or null"),
        (["--mode", "quick"], "unknown mode 'quick': choices"),
        (["--effort", "hihg"], "did you mean 'high'?"),
        (["--temperature", "-2"], "temperature: -2 is below 0, give a number of at least 0"),
        (["--top-p", "0"], "top_p: 0 is not above 0, give a number above 0 and at most 1, or null"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--prompt", "w1 " * 200], "the model's context is 96: shorten it"),
        (["--max-new-tokens", "500"], "ask for at most"),
        (["--set", "decoder.tau_maks=1"], "did you mean 'tau_mask'?"),
        (["--model", "nowhere-at-all"], "no diffusion checkpoint"),
        (["--batch", "no-such-file"], "give a text file"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(checkpoint, capsys, flags, says):
    prompt = [] if {"--prompt", "--batch"} & set(flags) else ["--prompt", "w1"]
    assert call(checkpoint, *prompt, *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and says in error


def test_a_prompt_begins_as_documents_do():
    tokenizer = small_tokenizer()
    assert encode_prompt(tokenizer, "w1 w2") == [0, *tokenizer("w1 w2", add_special_tokens=False)["input_ids"]]
    assert encode_prompt(tokenizer, "") == [0]


def test_the_live_view_colours_masks_drafts_and_edits():
    console = Console(force_terminal=True, width=80, record=True)
    cells = TokenCells(StubTokenizer(letters=True), [1])
    with TerminalView(cells.prompt(), console) as view:
        view.show(step_record(Step(0, 1, 0, "denoise", [1, 2], [(1, 2, 0.9)]), cells))
        view.show(step_record(Step(0, 2, 0, "denoise", [2], [(2, 3, 0.9)], [(1, 2, 5, 0.8)]), cells))
        picture = view.render()
    assert picture.plain.splitlines()[1] == "BFD"
    styles = {picture.plain[span.start : span.end]: str(span.style) for span in picture.spans}
    assert "yellow" in styles["F"] and "green" in styles["D"]
