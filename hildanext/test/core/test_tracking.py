"""Trackers: every number of a metric line arrives, and nothing else; what is missing is said before a run starts."""

import importlib.util

import pytest

from hildanext.core.errors import ConfigError, HildaError
from hildanext.core.metrics_log import MetricLog
from hildanext.core.tracking import TRACKERS, check_trackers, open_trackers, scalars

LINE = {
    "kind": "train",
    "step": 3,
    "loss": 1.5,
    "phase": "warmup",
    "losses": {"m2t": 1.0, "kl": 0.5},
    "accuracy_by_t": {"0.00-0.25": None, "0.25-0.50": 0.25},
    "whole": True,
    "tokens": 1024,
}


def test_scalars_are_the_numbers_of_a_line_and_nothing_else():
    assert scalars(LINE) == {
        "train/loss": 1.5,
        "train/losses/m2t": 1.0,
        "train/losses/kl": 0.5,
        "train/accuracy_by_t/0.25-0.50": 0.25,
        "train/tokens": 1024.0,
    }


def test_a_metric_log_tells_its_listeners_what_it_wrote(tmp_path):
    heard = []
    with MetricLog(tmp_path / "metrics.jsonl") as log:
        log.listeners.append(heard.append)
        log.write(**LINE)
    assert heard == [LINE]


def test_an_unknown_tracker_names_the_choices():
    with pytest.raises(HildaError, match=r"unknown tracker 'tensorbord'.*did you mean 'tensorboard'"):
        check_trackers(["tensorbord"])


@pytest.mark.parametrize("name", sorted(TRACKERS))
def test_a_tracker_without_its_package_says_what_to_install(name, monkeypatch):
    real = importlib.util.find_spec
    package = TRACKERS[name].package
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == package else real(wanted))
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        check_trackers([name])


def events(folder):
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulated = loading.EventAccumulator(str(folder))
    accumulated.Reload()
    return {tag: [(e.step, e.value) for e in accumulated.Scalars(tag)] for tag in accumulated.Tags()["scalars"]}


def test_tensorboard_shows_every_number_and_a_resumed_run_no_step_twice(tmp_path):
    pytest.importorskip("tensorboard", reason="the tracker's package is an extra")
    for start, steps in ((0, range(1, 6)), (3, range(4, 8))):  # killed after step 5, the checkpoint was at 3
        (tracker,) = open_trackers(["tensorboard"], tmp_path, {"seed": 0}, start)
        for step in steps:
            tracker.log(step, {"train/loss": float(step)})
        tracker.close()
    assert events(tmp_path / "tensorboard") == {"train/loss": [(step, float(step)) for step in range(1, 8)]}


def test_trackio_keeps_a_local_run_named_after_its_folder(tmp_path, monkeypatch):
    pytest.importorskip("trackio", reason="the tracker's package is an extra")
    import trackio

    opened = []
    monkeypatch.setattr(trackio, "init", lambda **options: opened.append(options) or FakeRun())
    (tracker,) = open_trackers(["trackio"], tmp_path / "run-7", {"seed": 0}, 0)
    tracker.log(2, {"train/loss": 1.0})
    tracker.close()
    assert opened[0]["name"] == "run-7" and opened[0]["resume"] == "allow"
    assert tracker.run.heard == [({"train/loss": 1.0}, 2), "finished"]


class FakeRun:
    def __init__(self):
        self.heard = []

    def log(self, values, step):
        self.heard.append((values, step))

    def finish(self):
        self.heard.append("finished")
