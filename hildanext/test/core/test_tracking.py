"""Trackers: every number of a metric line arrives, and nothing else; what is missing is said before a run starts."""

import importlib.machinery
import importlib.util
import sys
import types

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
        (tracker,) = open_trackers(["tensorboard"], tmp_path, {"seed": 0, "nested": {"rate": 1e-4}}, start)
        for step in steps:
            tracker.log(step, {"train/loss": float(step)})
        tracker.close()
    assert events(tmp_path / "tensorboard") == {"train/loss": [(step, float(step)) for step in range(1, 8)]}
    assert all(path.is_file() for path in (tmp_path / "tensorboard").iterdir())  # a folder would be another run


def test_tensorboard_shows_nothing_of_steps_that_a_resumed_run_has_not_reached_again(tmp_path):
    pytest.importorskip("tensorboard", reason="the tracker's package is an extra")
    for start, steps in ((0, range(1, 10)), (3, range(4, 6))):
        (tracker,) = open_trackers(["tensorboard"], tmp_path, {}, start)
        for step in steps:
            tracker.log(step, {"train/loss": start + step / 10})
        tracker.close()
    points = [(1, 0.1), (2, 0.2), (3, 0.3), (4, 3.4), (5, 3.5)]
    assert events(tmp_path / "tensorboard")["train/loss"] == [(step, pytest.approx(loss)) for step, loss in points]


def test_trackio_keeps_a_local_run_named_after_its_folder(tmp_path, monkeypatch):
    opened, heard = [], []

    class Run:
        def log(self, values, step):
            heard.append((values, step))

        def finish(self):
            heard.append("finished")

    trackio = types.ModuleType("trackio")
    trackio.__spec__ = importlib.machinery.ModuleSpec("trackio", None)
    trackio.init = lambda **options: opened.append(options) or Run()
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    (tracker,) = open_trackers(["trackio"], tmp_path / "run-7", {"seed": 0}, 0)
    tracker.log(2, {"train/loss": 1.0})
    tracker.close()
    (options,) = opened
    assert options["name"] == "run-7" and options["resume"] == "allow" and options["project"] == "hildanext"
    assert options["config"] == {"seed": 0} and options["embed"] is False
    assert heard == [({"train/loss": 1.0}, 2), "finished"]
