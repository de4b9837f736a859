"""What the page and the list of runs say of an alignment."""

import json
from pathlib import Path

import pytest

from hildanext.cli import main
from hildanext.core.metrics_log import MetricLog
from hildanext.core.run_dir import open_run
from hildanext.core.training_plots import training_plots
from hildanext.report.compare_runs import summarise
from hildanext.report.html import measured_table, write_report
from rl_lines import evaluation, rl_lines


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "aligned"
    open_run(folder, {"profile": "SAFE", "rl": {"model": "tiny"}}, seed=3)
    with MetricLog(folder / "metrics.jsonl") as log:
        for line in rl_lines():
            log.write(**line)
    training_plots(rl_lines(), folder / "plots")
    return folder


def test_the_page_shows_start_and_end_alarms_pictures_and_samples(run: Path):
    summary = {"before": evaluation(0, 0.52, True), "last": evaluation(60, 0.84, True), "whole": True}
    page = write_report(run, {"rl": {"rl_run": str(run), "rl": summary}}, "aligned").read_text(encoding="utf-8")
    section = page.split("<h2>Alignment</h2>")[1].split("<h2>")[0]
    assert "52.0 [42, 62]" in section and "84.0 [76, 90]" in section, "Wilson's intervals of 100 problems"
    assert "pass@8" in section and "Alarm <b>no_variance</b>, step 45: 55%" in section
    assert section.count("data:image/png;base64,") == 5
    assert "It is 4 &lt; 9." in section and "reward 1, advantage +0.500, step 60" in section
    assert section.index("It is 4") < section.index("It is 5")


def test_a_run_that_measured_nothing_has_no_table(run: Path):
    (run / "metrics.jsonl").write_text("")
    page = write_report(run, {"rl": {"rl_run": str(run), "rl": {"before": None, "last": None}}}, "x").read_text()
    assert "No alarm was raised" in page and "Wilson" not in page


def test_columns_that_nobody_measured_are_left_out():
    columns, rows = measured_table([("last", {**evaluation(5, 0.5), "tokens_per_forward": None})])
    assert columns == ["", "step", "greedy, %", "reward", "tokens", "tokens per forward", "ended, %"]
    assert rows == [["last", "5", "50.0 [40, 60]", "0.500", "13.0", "-", "100"]]


def test_the_list_of_runs_has_reward_and_accuracy(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    found = summarise(run)
    assert found.kind == "rl" and found.loss is None and found.accuracy == pytest.approx(0.8)
    assert found.reward == pytest.approx(sum(line["reward"] for line in _train()[-10:]) / 10)
    assert main(["runs", str(run.parent)]) == 0
    told = capsys.readouterr().out
    assert "reward" in told and "accuracy" in told and "0.8" in told
    assert main(["runs", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["reward"] == pytest.approx(found.reward)


def test_alignments_are_compared_by_their_accuracies(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = tmp_path / "other"
    open_run(other, {"profile": "SAFE", "rl": {"model": "small"}}, seed=4)
    (other / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    assert main(["runs", str(run), str(other), "--compare", "--plot", str(tmp_path / "both.png")]) == 0
    assert "held out: accuracy" in capsys.readouterr().out
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def _train() -> list:
    return [line for line in rl_lines() if line["kind"] == "train"]
