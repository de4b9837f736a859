"""The report is one page that needs nothing else, says what was measured, and survives hostile text."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hildanext.ar import Parent
from hildanext.cli import main
from hildanext.core.config import validate
from hildanext.core.errors import ConfigError, DataError
from hildanext.core.metrics_log import MetricLog
from hildanext.core.run_dir import open_run
from hildanext.core.training_plots import training_plots
from hildanext.datasets import PackedDataset, PrepareConfig, prepare
from hildanext.eval.evaluation import EvalConfig, evaluate, print_result, save_result
from hildanext.report import trace_html
from hildanext.report.html import EDIT_STORM, edit_storm, verdicts_of, write_report
from small_models import words_tokenizer
from training_fixtures import metric_lines

VOID = {"meta", "img", "br"}


class Checker(HTMLParser):
    """Collects unbalanced tags and everything a page could load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)


def step(forward: int, masks: list[int], drafts=(), edits=(), start: int = 0) -> dict:
    return {
        "forward": forward, "kind": "denoise", "block_start": start, "masks": masks, "final": False, "row": 0,
        "drafts": [{"position": at, "token": 1, "text": text, "probability": 0.9} for at, text in drafts],
        "edits": [
            {"position": at, "old": 1, "new": 2, "old_text": old, "new_text": new, "probability": 0.9}
            for at, old, new in edits
        ],
    }  # fmt: skip


STEPS = [
    step(1, [1, 2, 3], drafts=[(1, " cat"), (3, "<b>")]),
    step(2, [2], drafts=[(2, " sat")], edits=[(1, " cat", " dog")]),
]


@pytest.fixture
def run(tmp_path, make_model) -> tuple[Path, dict]:
    """A run's folder with training, evaluation and samples, from a tiny random model."""
    tokenizer = words_tokenizer()
    model = make_model("qwen3", "parent", block_size=4)
    text = tmp_path / "valid.txt"
    stories = [" ".join(f"w{3 + (7 * i + j) % 50}" for j in range(9)) for i in range(6)]
    text.write_text("\n<|endoftext|>\n".join(stories), encoding="utf-8")
    shards = str(tmp_path / "shards")
    prepare(PrepareConfig(source={"name": "tinystories", "path": str(text)}, out=shards), tokenizer)
    settings = validate(
        EvalConfig,
        {
            "model": "m", "data": shards, "sequence_length": 16, "pad_to_block": 4, "rows": 4,
            "likelihood": {"block_sizes": [1, 4], "draws": 2},
            "generation": {"prompts": 2, "prompt_tokens": 3, "new_tokens": 6},
        },
        where="eval",
    )  # fmt: skip
    dataset = PackedDataset(shards, 16, pad_to_block=4)
    result = evaluate(model, tokenizer, Parent(model.causal_lm, tokenizer, model.banned), dataset, settings)
    files = save_result(result, tmp_path / "run" / "eval")
    folder = tmp_path / "run"
    source = {"name": "parent", "documents": 5, "max_tokens": 9}
    open_run(folder, {"parent": "tiny", "prepare": {"valid": {"source": source}}, "note": "</pre><script>"}, seed=3)
    with MetricLog(folder / "convert" / "metrics.jsonl") as log:
        for line in metric_lines():
            log.write(**line)
    training_plots(metric_lines(), folder / "convert" / "plots")
    sample = {
        "way": "S_MODE", "prompt": "Once", "prompt_cells": ["Once"], "text": "", "finish_reason": "eos", "tokens": 2,
        "forwards": 2, "tokens_per_forward": 1.0, "tokens_per_second": 7.0, "edits": 1, "trace": {"steps": STEPS},
    }  # fmt: skip
    storm = {**sample, "way": "Q_MODE", "prompt": "Other", "tokens": 100, "edits": 312, "trace": {}, "text": " calm"}
    parents = {**sample, "way": "AR parent", "edits": 0, "trace": {}, "text": " there <i>was"}
    (folder / "samples.json").write_text(json.dumps({"samples": [sample, storm, parents]}), encoding="utf-8")
    outcomes = {
        "convert": {"run": str(folder / "convert")},
        "eval": {
            "results": str(files["json"]),
            "pictures": [str(path) for name, path in files.items() if name != "json"],
        },
        "generate": {"samples": str(folder / "samples.json")},
    }
    return folder, outcomes


def test_a_run_becomes_one_page_that_needs_nothing_else(run):
    folder, outcomes = run
    path = write_report(folder, outcomes, "a <demo> run")
    page = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page)
    assert path == folder / "report.html" and not checker.faults and not checker.open
    assert checker.links and all(link.startswith("data:image/png;base64,") for link in checker.links)
    assert len(checker.links) == 5 + 3, "training pictures and the evaluation's"
    for wanted in ("width=device-width", "prefers-color-scheme:dark", "a &lt;demo&gt; run", "stable"):
        assert wanted in page
    assert "<script" not in page and "<b>" not in page.split("Samples")[1].split("How it was measured")[0]


def test_the_page_says_what_each_number_is(run):
    folder, outcomes = run
    page = write_report(folder, outcomes, "demo").read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    for wanted in (
        "AR parent exact", "diffusion, block 4 bound", "±", "distinct-1/2/3", "tok/forward", "S_MODE (speed)",
        "Q_MODE (quality)", "exact entropy of the data", "seed 3, profile SAFE", "Step by step (2 forwards)", "float64",
    ):  # fmt: skip
        assert wanted in text, wanted


def test_the_parent_s_text_stands_beside_the_model_s_of_the_same_prompt(run):
    folder, outcomes = run
    page = write_report(folder, outcomes, "demo").read_text(encoding="utf-8")
    ours, other = page.split('<div class="beside">')[1:]
    assert "S_MODE (speed)" in ours and "AR parent, greedy" in ours and " there &lt;i&gt;was" in ours
    assert "Q_MODE (quality)" in other and "AR parent" not in other.split("<h2>")[0]
    assert "1 edits" in ours and "0 edits" not in ours, "a parent edits nothing"
    record = json.loads((folder / "samples.json").read_text()) | {"without_parent": "'<gone>' could not be had"}
    (folder / "samples.json").write_text(json.dumps(record))
    page = write_report(folder, outcomes, "demo").read_text(encoding="utf-8")
    assert "not beside them: &#x27;&lt;gone&gt;&#x27; could not be had." in page


def test_an_edit_storm_is_remarked_on_and_a_few_edits_are_not(run):
    folder, outcomes = run
    page = write_report(folder, outcomes, "demo").read_text(encoding="utf-8")
    assert "An edit storm: 312 edits for 100 tokens, more than 1 a token" in page
    assert page.split("<h2>Samples")[1].count("An edit storm") == 1
    assert edit_storm(100, int(100 * EDIT_STORM)) == "" and edit_storm(100, int(100 * EDIT_STORM) + 1) != ""
    assert edit_storm(0, 0) == ""
    evaluation = json.loads(Path(outcomes["eval"]["results"]).read_text())
    evaluation["generation"][0] |= {"tokens": 96, "edits": 401}
    Path(outcomes["eval"]["results"]).write_text(json.dumps(evaluation))
    page = write_report(folder, outcomes, "demo").read_text(encoding="utf-8")
    assert "<li>S_MODE (speed): An edit storm: 401 edits for 96 tokens" in page


def test_a_stage_that_did_not_run_is_left_out(run):
    folder, outcomes = run
    page = write_report(folder, {"eval": outcomes["eval"]}, "demo").read_text(encoding="utf-8")
    assert "Conversion" not in page and "Samples" not in page and "Likelihood of" in page
    assert "How it was measured" in write_report(folder, {}, "empty").read_text(encoding="utf-8")


def test_a_missing_result_is_an_error_that_says_what_to_do(run):
    folder, _ = run
    with pytest.raises(DataError, match="run the stage that writes it again"):
        write_report(folder, {"eval": {"results": str(folder / "nowhere.json")}}, "demo")


def test_the_final_text_keeps_what_was_handed_out_and_marks_edits():
    page = trace_html.final_text(STEPS, ["Once"], kept=2)
    assert '<span class="p">Once</span>' in page
    assert '<span class="e"> dog</span>' in page and " cat" not in page
    assert " sat" in page and "b&gt;" not in page, "the third token was cut"
    assert "&lt;b&gt;" in trace_html.final_text(STEPS, ["Once"], kept=3)


def test_steps_show_masks_drafts_and_edits():
    page = trace_html.step_by_step(STEPS, ["Once"])
    first, second = page.split('class="step"')[1:]
    assert first.count(trace_html.MASK) == 1 and '<span class="d"> cat</span>' in first and "&lt;b&gt;" in first
    assert '<span class="e"> dog</span>' in second and '<span class="d"> sat</span>' in second
    assert '<span class="k">&lt;b&gt;</span>' in second and trace_html.MASK not in second


def test_verdicts_follow_the_numbers_whichever_way_they_fall():
    def row(name: str, speed: float) -> dict:
        return {"name": name, "tokens_per_second": speed, "tokens_per_forward": 1.5, "generative_perplexity": 9.0}

    slow, fast = verdicts_of([row("S_MODE", 10.0), row("Q_MODE", 40.0), row("AR parent", 20.0)])
    assert "slower than (0.50 times the speed of) the AR parent" in slow
    assert "2.0 times as fast as the AR parent" in fast
    assert verdicts_of([row("S_MODE", 1.0)]) == []


def test_the_tables_print_everything(run, capsys):
    folder, outcomes = run
    print_result(json.loads(Path(outcomes["eval"]["results"]).read_text(encoding="utf-8")))
    printed = capsys.readouterr().out
    for wanted in ("nats/token", "AR parent", "diffusion, block 4", "gen. ppl", "one per step", "block size 4"):
        assert wanted in printed


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["eval", "--model", "m"], "give --data FOLDER"),
        (["eval", "--model", "m", "--data", "d", "--set", "eval.row=3"], "unknown key 'row', did you mean 'rows'?"),
        (["eval", "--model", "nowhere", "--data", "d"], "no diffusion checkpoint 'nowhere'"),
        (["bench", "decode", "--model", "nowhere"], "no model 'nowhere'"),
        (["bench", "train", "--set", "bench.repeats=0"], "repeats"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_exit_code_two(arguments, hint, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and hint in error


def test_block_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="does not divide the sequence length"):
        validate(EvalConfig, {"model": "m", "data": "d", "likelihood": {"block_sizes": [3]}}, where="eval")
    with pytest.raises(ConfigError, match="pad_to_block 12 and the block size 32"):
        section = {"model": "m", "data": "d", "pad_to_block": 12, "likelihood": {"block_sizes": [4, 32]}}
        validate(EvalConfig, section, where="eval")
