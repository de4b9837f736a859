"""Alarms: made-up histories that raise each, and others that are close and do not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hildanext.core.errors import HildaError, TrainingStopped, UnknownChoice
from hildanext.core.metrics_log import MetricLog, read_metrics
from hildanext.grading.gsm8k import Gsm8kReward
from hildanext.grading.weighted import WeightedReward
from hildanext.rl.alarms import ALARMS, LATE, WINDOW, Facts, History, Watch, facts_of
from hildanext.rl.config import read_config

CALM = {
    "reward": 0.5, "solved": 0.4, "zero_variance": 0.3, "unique": 0.6, "length": 60.0, "entropy": 1.2,
    "tokens_per_forward": 2.0, "reward_parts": {"right": 0.4, "form": 0.5}, "replay_off": 2e-5, "ratio_max": 1.0,
}  # fmt: skip
FACTS = Facts(highest=1.0, group=8, form_parts=("form",))
PAID = Facts(highest=1.1, group=8, pays_form=True)


def rounds(*stretches: tuple[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """So many rounds of each stretch, calm but for what it says."""
    fields = [more for count, more in stretches for _ in range(count)]
    return [
        {"kind": "train", "step": at + 1, "round": at, "update": 0, **CALM, **more} for at, more in enumerate(fields)
    ]


def evals(*accuracies: float) -> list[dict[str, Any]]:
    return [{"kind": "eval", "step": 10 * at, "accuracy": value} for at, value in enumerate(accuracies)]


def told(lines: list[dict[str, Any]], facts: Facts = FACTS) -> set[str]:
    past = History()
    for line in lines:
        past.add(line)
    return {name for name, rule in ALARMS.items() if rule(past, facts) is not None}


RAISING: list[tuple[str, str, list[dict[str, Any]], Facts]] = [
    ("ratio", "the replay is off", rounds((1, {"replay_off": 0.01})), FACTS),
    ("ratio", "old and new differ", rounds((3, {}), (1, {"ratio_max": 1.02})), FACTS),
    ("ratio", "it is no number", rounds((1, {"ratio_max": float("nan")})), FACTS),
    ("ratio", "bf16", rounds((1, {"replay_off": 0.3})), Facts(1.0, 8, torch.bfloat16)),
    ("ratio", "fp64", rounds((1, {"replay_off": 2e-5})), Facts(1.0, 8, torch.float64)),
    ("equal_answers", "one text a group", rounds((2, {"unique": 1 / 8})), FACTS),
    ("equal_answers", "some were dropped", rounds((5, {}), (2, {"unique": 0.1})), FACTS),
    ("no_variance", "most groups agree", rounds((WINDOW, {"zero_variance": 0.55})), FACTS),
    ("no_variance", "a reward of its own range", rounds((WINDOW, {"zero_variance": 0.8, "reward": 0.95})), PAID),
    ("entropy", "it falls to a sixth", rounds((WINDOW, {}), (WINDOW, {"entropy": 0.2})), FACTS),
    ("length", "60 to 19", rounds((WINDOW, {}), (WINDOW, {"length": 19.0})), FACTS),
    ("tokens_per_forward", "half more", rounds((WINDOW, {}), (WINDOW, {"tokens_per_forward": 3.0})), FACTS),
    ("form", "a part", rounds((WINDOW, {}), (WINDOW, {"reward_parts": {"form": 0.7}, "solved": 0.4})), FACTS),
    ("form", "of gsm8k", rounds((WINDOW, {"reward": 0.45}), (WINDOW, {"reward": 0.50})), PAID),
    (
        "held_out",
        "as at the start",
        [*evals(0.5, *[0.5] * LATE), *rounds((WINDOW, {}), (WINDOW, {"reward": 0.7, "solved": 0.6}))],
        FACTS,
    ),
]
CLOSE: list[tuple[str, str, list[dict[str, Any]], Facts]] = [
    ("ratio", "rounding", rounds((3, {"replay_off": 9e-4, "ratio_max": 1.0009})), FACTS),
    ("ratio", "bf16", rounds((1, {"replay_off": 0.05})), Facts(1.0, 8, torch.bfloat16)),
    ("ratio", "later updates move it", [{**rounds((1, {}))[0], "update": 1, "ratio_max": 1.3}], FACTS),
    ("ratio", "nothing was learnt", [{"kind": "train", "step": 1, "round": 0, "reward": 0.0}], FACTS),
    ("equal_answers", "one round", rounds((1, {"unique": 1 / 8}), (1, {}), (1, {"unique": 1 / 8})), FACTS),
    ("equal_answers", "two texts in one group", rounds((4, {"unique": 1 / 8 + 1 / 64})), FACTS),
    ("no_variance", "half of them", rounds((WINDOW, {"zero_variance": 0.5})), FACTS),
    ("no_variance", "too early", rounds((WINDOW - 1, {"zero_variance": 0.9})), FACTS),
    ("no_variance", "solved", rounds((WINDOW, {"zero_variance": 0.9, "reward": 0.93})), FACTS),
    ("entropy", "it falls to a quarter", rounds((WINDOW, {}), (WINDOW, {"entropy": 0.3})), FACTS),
    ("entropy", "solved", rounds((WINDOW, {}), (WINDOW, {"entropy": 0.01, "reward": 0.95, "solved": 0.9})), FACTS),
    ("entropy", "too early", rounds((WINDOW, {}), (WINDOW - 1, {"entropy": 0.01})), FACTS),
    ("length", "60 to 21", rounds((WINDOW, {}), (WINDOW, {"length": 21.0})), FACTS),
    ("tokens_per_forward", "less than half", rounds((WINDOW, {}), (WINDOW, {"tokens_per_forward": 2.9})), FACTS),
    ("tokens_per_forward", "nobody tells", rounds((30, {"tokens_per_forward": None})), FACTS),
    ("form", "and right", rounds((WINDOW, {}), (WINDOW, {"reward_parts": {"form": 0.7}, "solved": 0.5})), FACTS),
    ("form", "no part of it", rounds((WINDOW, {}), (WINDOW, {"reward_parts": {"form": 0.7}})), Facts(1.0, 8)),
    (
        "held_out",
        "it rises",
        [*evals(0.5, 0.5, 0.52, 0.55), *rounds((WINDOW, {}), (WINDOW, {"reward": 0.7, "solved": 0.6}))],
        FACTS,
    ),
    ("held_out", "the reward stays", [*evals(0.5, 0.4, 0.4, 0.4), *rounds((2 * WINDOW, {}))], FACTS),
    (
        "held_out",
        "too few",
        [*evals(0.5, 0.5, 0.5), *rounds((WINDOW, {}), (WINDOW, {"reward": 0.7, "solved": 0.6}))],
        FACTS,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "what", "lines", "facts"), RAISING, ids=lambda value: str(value)[:24])
def test_a_history_raises_its_alarm_and_no_other(name: str, what: str, lines: list, facts: Facts):
    assert told(lines, facts) == {name}


@pytest.mark.parametrize(("name", "what", "lines", "facts"), CLOSE, ids=lambda value: str(value)[:24])
def test_a_history_that_is_close_raises_none(name: str, what: str, lines: list, facts: Facts):
    assert told(lines, facts) == set()


def test_every_alarm_has_a_history_of_both_kinds():
    assert {name for name, *_ in RAISING} == {name for name, *_ in CLOSE} == set(ALARMS)


def watched(path: Path, lines: list[dict[str, Any]], guard: tuple[str, ...] = ()) -> list[str]:
    """The alarms in the file, after its lines were written one by one."""
    with MetricLog(path) as log:
        Watch(FACTS, guard).open(log)
        for line in lines:
            log.write(**line)
    return [line["alarm"] for line in read_metrics(path) if line["kind"] == "alarm"]


class TestWatch:
    LINES = rounds((WINDOW, {}), (2 * WINDOW, {"zero_variance": 0.9, "length": 10.0}))

    def test_each_alarm_is_written_once_with_its_step_and_words(self, tmp_path: Path, caplog):
        assert sorted(watched(tmp_path / "m.jsonl", self.LINES)) == ["length", "no_variance"]
        alarm = next(line for line in read_metrics(tmp_path / "m.jsonl") if line.get("alarm") == "length")
        assert alarm["step"] == 2 * WINDOW and "60 to 10 tokens" in alarm["words"]
        assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
        assert f"step {2 * WINDOW}: alarm length" in caplog.text

    @pytest.mark.parametrize("cut", [3, WINDOW + 4, 2 * WINDOW - 1, 2 * WINDOW + 3])
    def test_a_run_that_goes_on_says_what_one_that_was_not_stopped_says(self, tmp_path: Path, cut: int):
        whole, parted = tmp_path / "whole.jsonl", tmp_path / "parted.jsonl"
        watched(whole, self.LINES)
        watched(parted, self.LINES[: cut + 2])
        with MetricLog(parted) as log:  # killed; the state was of two steps before
            log.truncate_after(cut)
        watched(parted, self.LINES[cut:])
        assert parted.read_text() == whole.read_text()

    def test_the_guard_stops_the_run_once_the_alarm_is_written(self, tmp_path: Path):
        with pytest.raises(TrainingStopped, match=rf"alarm length at step {2 * WINDOW}: .*out of rl\.guard"):
            watched(tmp_path / "m.jsonl", self.LINES, ("length",))
        assert [line["kind"] for line in read_metrics(tmp_path / "m.jsonl")][-1] == "alarm"
        watched(tmp_path / "other.jsonl", self.LINES, ("entropy",))

    def test_lines_without_news_are_not_judged(self, tmp_path: Path):
        samples = [{"kind": "sample", "step": 1, "answer": "4"}, {"kind": "eval", "step": 1, "reward": 0.3}]
        assert watched(tmp_path / "m.jsonl", samples) == []


class TestNames:
    def test_a_guard_that_is_no_alarm_is_refused(self):
        with pytest.raises(HildaError, match="unknown alarm 'lenght': did you mean 'length'"):
            read_config({"model": "tiny", "guard": ["lenght"]})
        with pytest.raises(UnknownChoice):
            read_config({"model": "tiny", "guard": ["all"]})
        config, _ = read_config({"model": "tiny", "guard": ["length", "ratio"]})
        assert config.guard == ("length", "ratio")

    def test_what_a_reward_pays_for_the_form(self):
        parts = {
            "right": {"reward": {"name": "gsm8k", "format_weight": 0.0}},
            "form": {"reward": {"name": "format"}, "weight": 0.1},
        }
        facts = facts_of(WeightedReward(parts=json.loads(json.dumps(parts))), 4, torch.float32)
        assert facts.form_parts == ("form",) and not facts.pays_form and facts.highest == pytest.approx(1.1)
        assert facts_of(Gsm8kReward(), 4, torch.float32).pays_form
        assert not facts_of(Gsm8kReward(format_weight=0.0), 4, torch.float32).pays_form
