"""The comparison of alignments: what it runs, what it runs again, and what it reads from the runs' files."""

import json
from pathlib import Path

import numpy as np
import pytest

from hildanext.bench.rl import comparison, comparison_report, runs
from hildanext.bench.rl.config import RlComparisonConfig
from hildanext.bench.rl.intervals import crossed_bootstrap
from hildanext.bench.rl.readings import read
from hildanext.cli import main
from hildanext.core.errors import ConfigError, DataError, HildaError
from hildanext.core.metrics_log import MetricLog
from hildanext.core.registry import under_profile
from hildanext.core.run_dir import open_run
from hildanext.core.runtime import machine

SHARED = {
    "problems": {"name": "arithmetic", "count": 60, "steps": 1, "held_out": 0.3},
    "rollouts": {"name": "engine", "max_new_tokens": 8, "slots": 4},
    "rounds": 2,
    "problems_per_round": 2,
    "group": 2,
    "measure": {"problems": 4, "samples": 2},
    "train": {"evaluate_every": 1, "batch_size": 2},
}
METHODS = {"espo": {"objective": {"name": "espo"}}, "agrpo": {"objective": {"name": "agrpo"}}}
ENDS = {"espo": "1110", "espo-shuffled": "1000", "agrpo": "1100", "raft": "1100"}


@pytest.fixture(autouse=True)
def full():
    with under_profile("FULL"):
        yield


def settings(**changes) -> RlComparisonConfig:
    return RlComparisonConfig(**{"shared": SHARED, "methods": METHODS, "seeds": (1, 2), **changes})


class Written:
    """In the place of a run's process: writes the files of a run that came to its end."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fails: dict[str, str] = {}

    def __call__(self, run, profile, threads, start):
        self.asked.append(run.told)
        if run.told in self.fails:
            return self.fails[run.told], 0.0
        sections = {"profile": profile, "rl": dict(run.section)}
        facts = {"fingerprint": str(run.section["problems"].get("seed", 0)), "train": 9, "held_out": 4}
        open_run(run.folder, sections, run.seed, {"problems": facts, "machine": machine()})
        rate = run.section["train"].get("learning_rate", {}).get("peak", 1e-5)
        end = ENDS.get(run.name, "1100" if rate == 0.5 else "1000")
        with MetricLog(run.folder / "metrics.jsonl") as log:
            for step, right in ((0, "1000"), (1, "1000"), (2, end)):
                if step:
                    log.write(
                        kind="train", step=step, seconds=2.0, columns=100.0, answers=3, dropped=1, update=0, reward=0.5,
                        entropy=1.0 / step, seconds_rollout=1.0, seconds_reward=0.1, seconds_known=0.2,
                    )  # fmt: skip
                log.write(
                    kind="eval", step=step, right=right, accuracy=right.count("1") / 4, tokens_per_forward=1.0 + step,
                    length=5.0, sampled_right="2 1 0 0" if step else "1 1 0 0", zero_variance=0.5,
                    **({} if step == 1 else {"corrected": 0.5 - step / 10, "kept": 0.75}),
                )  # fmt: skip
        done = {"section": json.loads(json.dumps(run.section)), "start": start, "peak_bytes": 2**20, "wall_seconds": 1}
        (run.folder / "done.json").write_text(json.dumps(done))
        return None, 1.0


@pytest.fixture
def written(monkeypatch) -> Written:
    stub = Written()
    monkeypatch.setattr(runs, "_apart", stub)
    monkeypatch.setattr(runs, "start_hash", lambda start: f"hash of {start}")
    return stub


def test_a_row_says_what_the_files_of_its_runs_say(written, tmp_path):
    result = comparison.measure("tiny", settings(), tmp_path, "FULL")
    assert written.asked == [f"{name}, seed {seed}" for name in ("espo", "agrpo", "espo-shuffled") for seed in (1, 2)]
    espo, agrpo, shuffled = result["rows"]
    assert espo["greedy"]["starts"] == [0.25, 0.25] and espo["greedy"]["ends"] == [0.75, 0.75]
    assert espo["greedy"]["gain"] == 0.5 and espo["greedy"]["low"] < 0.5 < espo["greedy"]["high"]
    assert agrpo["greedy"]["gain"] == 0.25 and shuffled["greedy"]["gain"] == 0.0 and shuffled["control"]
    assert espo["sampled"]["start"] == pytest.approx(2 / 8) and espo["sampled"]["end"] == pytest.approx(3 / 8)
    assert espo["pass_at_k"]["start"] == espo["pass_at_k"]["end"] == 0.5
    assert espo["columns"] == 200 and espo["rollouts"] == 8 and espo["seconds"] == 4.0
    assert espo["entropy"]["start"] == 1.0 and espo["entropy"]["end"] == 0.5
    assert espo["corrected"]["starts"] == [0.5, 0.5] and espo["corrected"]["end"] == pytest.approx(0.3)
    assert espo["kept"]["end"] == 0.75 and result["start_row"]["corrected"] == 0.5
    assert espo["tokens_per_forward"]["end"] == 3.0 and espo["peak_bytes"] == 2**20
    assert [point["columns"] for point in espo["curves"][0]] == [0, 100, 200]
    assert result["start_row"]["greedy"] == 0.25 and result["budget"]["rollouts"] == 8
    assert "parent" in result["not_there"][0], "what is not measured is named"
    text = comparison_report.markdown(result)
    assert "espo-shuffled (control)" in text and "no update (control)" in text and "+0.50 [" in text
    assert "0.50 > 0.30" in text and "0.75 > 0.75" in text
    assert comparison_report.draw(result, tmp_path / "a.png").stat().st_size > 10_000
    assert len(comparison_report.tables(result)) == 2


def test_what_is_finished_is_not_run_again_and_what_broke_off_is(written, tmp_path):
    written.fails = {"agrpo, seed 2": "the guard stopped it"}
    result = comparison.measure("tiny", settings(), tmp_path, "FULL")
    assert result["rows"][1]["seeds"] == [1] and result["rows"][1]["failed"] == {"2": "the guard stopped it"}
    assert "agrpo, seed 2, did not end: the guard stopped it" in comparison_report.markdown(result)
    written.asked, written.fails = [], {}
    said: list[str] = []
    again = comparison.measure("tiny", settings(), tmp_path, "FULL", said.append)
    assert written.asked == ["agrpo, seed 2"] and said[0] == "5 of 6 runs are done already"
    assert again["rows"][1]["seeds"] == [1, 2]


def test_a_folder_of_other_runs_is_refused_before_anything_runs(written, tmp_path, monkeypatch):
    comparison.measure("tiny", settings(), tmp_path, "FULL")
    written.asked = []
    other = settings(shared={**SHARED, "rounds": 4})
    with pytest.raises(ConfigError, match="finished run of another section"):
        comparison.measure("tiny", other, tmp_path, "FULL")
    monkeypatch.setattr(runs, "start_hash", lambda start: "other weights")
    with pytest.raises(ConfigError, match="finished run of another start"):
        comparison.measure("tiny", settings(), tmp_path, "FULL")
    assert not written.asked


def test_where_all_fail_there_is_no_table(written, tmp_path):
    one = settings(seeds=(1,), methods={"espo": {}}, controls={"shuffled": ()})
    written.fails = {"espo, seed 1": "no room"}
    with pytest.raises(DataError, match="not one run"):
        comparison.measure("tiny", one, tmp_path, "FULL")


def test_a_grid_chooses_the_rate_on_seeds_that_are_not_reported(written, tmp_path):
    chosen = settings(grid=(0.1, 0.5, 0.7), grid_seeds=(7,), grid_shared={"rounds": 1}, controls={"raft": True})
    written.fails = {"agrpo, rate 0.7, seed 7": "too fast"}
    result = comparison.measure("tiny", chosen, tmp_path, "FULL")
    assert result["grid"]["espo"] == {"0.1": 0.25, "0.5": 0.5, "0.7": 0.25}
    assert result["grid"]["agrpo"]["0.7"] is None, "a rate that failed is not chosen"
    assert set(result["grid"]) == {"espo", "agrpo", "raft"}, "a control of a method takes that method's rate"
    assert {row["name"]: row["learning_rate"] for row in result["rows"]} == dict.fromkeys(ENDS, 0.5)
    assert all(row["seeds"] == [1, 2] for row in result["rows"])
    assert "Greedy accuracy by learning rate" in comparison_report.markdown(result)


def test_of_equal_rates_the_smallest_is_taken():
    assert comparison._best({"0.1": 0.5, "0.01": 0.5, "1": 0.4, "2": None}) == 0.01
    assert comparison._best({"1": None}) is None


def test_other_problems_are_not_compared(written, tmp_path):
    methods = {"espo": {}, "other": {"problems": {"name": "arithmetic", "count": 60, "seed": 3, "held_out": 0.3}}}
    with pytest.raises(ConfigError, match="not asked the same problems"):
        comparison.measure("tiny", settings(methods=methods), tmp_path, "FULL")


def test_a_parent_that_is_none_is_refused(written, tmp_path):
    with pytest.raises(ConfigError, match="controls.parent"):
        comparison.measure("tiny", settings(controls={"parent": "tiny"}), tmp_path, "FULL")
    assert not written.asked


def test_the_parent_is_asked_token_by_token():
    *_, parent = settings(controls={"parent": "p"}).contenders()
    assert (parent.name, parent.start, parent.control) == ("parent", "p", True)
    assert parent.section["likelihood"] == {"name": "left_to_right"}
    assert parent.section["rollouts"]["order"] == "left_to_right"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": {}}, "no methods"),
        ({"seeds": ()}, "no seeds"),
        ({"seeds": (1, 2), "grid": (0.1,), "grid_seeds": (2,)}, "seed 2 is both reported and of the grid"),
        ({"grid": (0.1,)}, "has grid and no grid_seeds"),
        ({"controls": {"shuffled": ("wd2",)}}, "no method 'wd2'"),
        ({"methods": {"../up": {}}}, "a method named '../up'"),
        ({"methods": {"espo": {}, "long": {"rounds": 3}}}, "long has 12 rollouts and espo has 8"),
        ({"methods": {"espo": {}, "b": {"measure": {"problems": 2}}}}, "b is measured otherwise than espo"),
        ({"methods": {"espo": {"objective": {"name": "espoo"}}}}, "espoo"),
        ({"methods": {"espo": {"round": 3}}}, "round"),
    ],
)
def test_a_comparison_that_makes_no_sense_is_refused(changes, said):
    with pytest.raises(HildaError, match=said):
        settings(**changes)


def test_a_full_method_is_refused_under_safe():
    with under_profile("SAFE"), pytest.raises(ConfigError, match="FULL"):
        settings()
    with under_profile("SAFE"):
        settings(methods={"espo": {}})


def test_the_crossed_bootstrap_knows_that_seeds_differ():
    rng = np.random.default_rng(0)
    problems = (rng.random((1, 200)) < 0.5).astype(float)
    agree = np.repeat(problems, 3, 0)
    low, high = crossed_bootstrap(agree)
    spread = 1.96 * float(problems.std()) / 200**0.5
    assert high - low == pytest.approx(2 * spread, rel=0.1), "seeds that are alike add nothing: the problems' interval"
    differ = agree + np.array([[-0.4], [0.0], [0.4]])
    wide_low, wide_high = crossed_bootstrap(differ)
    assert wide_high - wide_low > 3 * (high - low)
    assert crossed_bootstrap(np.full((2, 5), 0.25)) == (0.25, 0.25)
    assert crossed_bootstrap(agree, 1) == crossed_bootstrap(agree, 1)


def test_a_run_of_the_stage_is_read_and_one_that_fails_says_why(tmp_path, monkeypatch):
    section = {**SHARED, "rounds": 1, "model": "tiny", "seed": 1}
    run = runs.Run("espo", 1, tmp_path / "a", section)
    problem, peak = runs._align(run, "SAFE", 1)
    assert problem is None
    (run.folder / runs.DONE).write_text(json.dumps({"section": section, "start": "", "peak_bytes": peak}))
    found = read(run.folder, 1)
    assert found.rollouts == 4 and len(found.curve) == 2 and len(found.after["right"]) == 4
    assert len(found.after["sampled_right"].split()) == 4 and found.curve[0]["rollouts"] == 0
    broken = runs.Run("espo", 1, tmp_path / "b", {**section, "model": "nothing"})
    assert "nothing" in runs._align(broken, "SAFE", 1)[0]
    with pytest.raises(DataError, match="no whole run"):
        read(tmp_path / "b", 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rl"], "bench rl keeps every part of it: give --out FOLDER"),
        (["decode", "--jobs", "2"], "--jobs is about runs of methods"),
        (["rl-gradient"], "FULL"),
        (["rl-speed", "--chat", "a"], "--chat is about steps of fine-tuning"),
        (["rl", "--out", "o", "--set", "bench.method=1"], "did you mean 'methods'"),
    ],
)
def test_the_verb_refuses_what_makes_no_sense(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_verb_writes_its_tables_into_the_folder(written, tmp_path, capsys):
    run = {"profile": "FULL", "bench": {"shared": SHARED, "methods": METHODS, "seeds": [1]}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    out = tmp_path / "out"
    words = ["bench", "rl", "--config", str(tmp_path / "run.json"), "--out", str(out), "--model", "tiny", "--jobs", "2"]
    assert main(words) == 0
    assert sorted(path.name for path in out.iterdir()) == ["bench.json", "bench.md", "bench.png", "runs"]
    told = json.loads(Path(out / "bench.json").read_text())
    assert told["start"] == "tiny" and told["settings"]["jobs"] == 2 and "no update" in (out / "bench.md").read_text()
