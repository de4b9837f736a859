"""What a step of an alignment costs: that the accounting is right, on the embedded model."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from hildanext.bench.rl import speed, speed_report
from hildanext.core.config import config
from hildanext.core.errors import ConfigError, DataError, HildaError
from hildanext.core.registry import under_profile
from hildanext.grading.base import Reward
from hildanext.grading.rewards import REWARDS
from hildanext.models.loading.load import load_diffusion

SHARED: dict[str, Any] = {
    "problems": {"name": "arithmetic", "count": 40, "steps": 1, "held_out": 0.3},
    "reward": {"name": "even"},
    "rollouts": {"name": "engine", "max_new_tokens": 8, "slots": 8},
    "problems_per_round": 2,
    "group": 4,
    "train": {"batch_size": 2},
}


@config
class Even(Reward):
    """Half of all answers are right, whatever they say."""

    def check(self, problem: Mapping[str, Any]) -> None:
        pass

    def score(self, problems: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> list[float | None]:
        return [float("####" in text or len(text) % 2 == 0) for text in completions]


@pytest.fixture(autouse=True)
def even(monkeypatch):
    monkeypatch.setitem(REWARDS, "even", Even)


def settings(**changes) -> speed.RlSpeedConfig:
    return speed.RlSpeedConfig(shared={**SHARED, **changes}, rounds=1, repeats=1)


def test_every_part_stands_beside_the_same_work_by_hand(tmp_path):
    result = speed.measure("tiny", settings(), "SAFE")
    rollouts, updates, steps = result["rollouts"], result["updates"], result["steps"]
    assert rollouts["answers"] == 8 and rollouts["rows"] == 8
    assert rollouts["ways"]["loop"]["like_engine"] == 1.0, "the bare loop writes the same answers"
    assert rollouts["ways"]["engine"]["reward"] == rollouts["ways"]["loop"]["reward"]
    assert rollouts["ways"]["engine"]["tokens"] == rollouts["ways"]["loop"]["tokens"] > 0
    assert 0 < rollouts["engine_share_of_network"] < 1.5
    assert updates["ways"]["packed"]["columns"] < updates["ways"]["unpacked"]["columns"]
    assert updates["columns_ratio"] == updates["ways"]["unpacked"]["columns"] / updates["ways"]["packed"]["columns"]
    assert updates["ways"]["sft"]["columns"] == pytest.approx(updates["ways"]["unpacked"]["columns"], rel=0.5)
    assert updates["looks"] == 2, "a coupled pair"
    assert steps["steps"] == 1, "the first of a run is not counted"
    assert set(steps["parts"]) == set(steps["shares"]) == {"rollout", "reward", "known", "update", "loop"}
    assert sum(steps["parts"].values()) == pytest.approx(steps["seconds"], rel=1e-6), "one step: parts add up"
    assert json.loads(json.dumps(result))
    text = speed_report.markdown(result)
    assert "rollouts through the engine" in text and "fine-tuning on the same rows and masks" in text
    assert len(speed_report.tables(result)) == 3


def test_the_step_by_hand_is_the_stage_s(tmp_path, monkeypatch):
    """The same answers and the same weights afterwards: what is timed is the same work."""
    steps = speed._Steps(settings().section("tiny"), tmp_path, "SAFE")
    kept, close = [], speed.Opened.close
    monkeypatch.setattr(speed.Opened, "close", lambda opened: (kept.append(opened.policy.model), close(opened)))
    steps.repeat(1)
    cpu = torch.device("cpu")
    stage, _ = load_diffusion(str(tmp_path / "real-1" / "checkpoint"), torch.float32, cpu)
    start, _ = load_diffusion("tiny", torch.float32, cpu)
    moved = 0.0
    for ours, theirs, before in zip(kept[0].parameters(), stage.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach())
        moved += float((theirs - before).detach().abs().sum())
    assert moved > 0
    told = [
        [json.loads(path.read_text())["answers"] for path in sorted((tmp_path / name).rglob("*from-*.json"))]
        for name in ("real-1", "hand-1")
    ]
    assert told[0] == told[1] and len(told[0]) == 2


def test_where_no_group_differs_there_is_nothing_to_measure():
    with pytest.raises(DataError, match="no group of the first round has different rewards"):
        speed.measure("tiny", settings(reward={"name": "gsm8k"}), "SAFE")


def test_other_rollouts_than_the_engine_are_refused():
    with pytest.raises(HildaError, match="openai"):
        settings(rollouts={"name": "openai"})
    with under_profile("SAFE"), pytest.raises(ConfigError, match="FULL"):
        settings(objective={"name": "agrpo"})
