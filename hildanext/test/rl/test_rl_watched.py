"""A whole alignment that is watched: its figures, the alarm that stops it, and that it goes on without the guard."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hildanext.core.errors import TrainingStopped
from hildanext.core.metrics_log import read_metrics
from hildanext.grading.rewards import REWARDS
from hildanext.rl import alarms
from hildanext.rl_stage2 import rl
from rl_toy import LettersReward, toy_section
from training_fixtures import small_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_checkpoint(tmp_path_factory.mktemp("watched") / "model"))


@pytest.fixture(autouse=True)
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REWARDS, "letters", LettersReward)


def lines_of(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == kind]


def test_what_a_step_says_of_itself_and_its_pictures(model: str, tmp_path: Path):
    section = toy_section(model, rounds=2, updates=2, objective={"name": "espo", "beta": 0.1})
    rl(section, tmp_path / "run", quiet=True)
    first, second, *_ = lines_of(tmp_path / "run", "train")
    for line in (first, second):
        spent = sum(line[f"seconds_{part}"] for part in ("rollout", "reward", "known", "update"))
        assert 0.5 * line["seconds"] < spent <= line["seconds"]
        assert line["columns"] > 0 and line["resident_mib"] > 50 and line["answers_per_second"] > 0
        assert {"ratio", "clipped", "kl"} <= set(line["losses"])
    assert first["reference_max"] < 1e-4 < second["reference_max"], "it begins at its reference"
    assert first["seconds_rollout"] > 0 and second["seconds_rollout"] == 0.0 and second["seconds_known"] == 0.0
    names = {file.stem for file in (tmp_path / "run" / "plots").glob("*.png")}
    assert names == {"reward", "policy", "answers", "distance", "time_split"}
    assert not lines_of(tmp_path / "run", "alarm")


def test_a_guarded_alarm_stops_the_run_which_goes_on_without_the_guard(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "run"
    with monkeypatch.context() as tighter:
        tighter.setitem(alarms.TOLERANCES, torch.float32, -1.0)  # nothing is within it
        with pytest.raises(TrainingStopped, match=r"alarm ratio at step 1: before the first update of round 0"):
            rl(toy_section(model, guard=["ratio"]), run, quiet=True)
        assert [line["alarm"] for line in lines_of(run, "alarm")] == ["ratio"]
        assert rl(toy_section(model), run, quiet=True)["whole"]
        assert [(line["alarm"], line["step"]) for line in lines_of(run, "alarm")] == [("ratio", 1)], "said once"
    assert [line["step"] for line in lines_of(run, "train")] == [1, 2, 3, 4]
