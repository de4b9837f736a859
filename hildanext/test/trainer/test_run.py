"""A run of training: compared before it goes on, measured at its start once, concluded when it is whole."""

from pathlib import Path

import pytest
import torch

from conftest import random_model
from hildanext.core.config import config
from hildanext.core.errors import ConfigError
from hildanext.core.metrics_log import run_metrics
from hildanext.core.run_dir import read_run
from hildanext.corruption.schedules import BlockPhase
from hildanext.losses import LOSSES, Outcome, SupervisedStep
from hildanext.losses.mask_to_token import MaskToToken
from hildanext.trainer.config import TrainConfig
from hildanext.trainer.run import TrainingRun, comparable_section, refuse_graph_losses
from hildanext.trainer.state import STATE
from hildanext.trainer.task import Callbacks, TrainingTask
from hildanext.training import _WindowSums


@config
class RolloutConfig:
    """A stage that has no data set at all."""

    temperature: float = 1.0
    device: str = "cpu"
    seed: int = 0
    train: TrainConfig = TrainConfig(precision="no")


def compared(record):
    return comparable_section(RolloutConfig, record, "rl", ("device",))


def task(finished=None) -> TrainingTask:
    return TrainingTask(
        total=100,
        block_phase=lambda seen: BlockPhase(phase="stable", block_size=4, tokens=100),
        views=lambda index, block_phase: [],
        validate=lambda step, number: {"bound": 2.0},
        callbacks=Callbacks(finished=finished),
    )


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hildanext.trainer.run.training_plots", lambda metrics, folder: [])


def test_a_stage_without_data_opens_its_run_and_says_what_it_is(tmp_path: Path):
    run = TrainingRun(tmp_path, RolloutConfig(seed=5))
    run.write_record(run.record({"profile": "SAFE", "rl": {"temperature": 0.7}}, prompts="abc"))
    record = read_run(tmp_path)
    assert record["seed"] == 5 and record["prompts"] == "abc" and record["processes"] == 1
    assert record["config"]["rl"] == {"temperature": 0.7} and record["machine"]["device"] == "cpu"


def test_a_state_goes_on_under_what_decides_its_numbers_alone(tmp_path: Path):
    run = TrainingRun(tmp_path, RolloutConfig())
    run.write_record(run.record({"rl": {"temperature": 0.7}}))
    changed = run.record({"rl": {"temperature": 0.8}})
    run.check_resumes(changed, compared)  # there is no state yet
    (tmp_path / STATE).mkdir()
    harmless = {"device": "mps", "train": {"precision": "no", "stop_after": 3}}
    run.check_resumes(run.record({"rl": {"temperature": 0.7, **harmless}}), compared)
    with pytest.raises(ConfigError, match=r"temperature was 0\.7 and is 0\.8"):
        run.check_resumes(changed, compared)


def test_the_start_is_measured_once(tmp_path: Path):
    run, step = TrainingRun(tmp_path, RolloutConfig()), SupervisedStep(random_model(), {"m2t": MaskToToken()})
    run.measure_start(task(), step)
    run.measure_start(task(), step)
    assert run_metrics(tmp_path) == [{"kind": "eval", "step": 0, "tokens": 0, "mask_positions": 0, "bound": 2.0}]
    assert list(run.evaluations()) == [0]


@pytest.mark.parametrize(
    "tokens, finished, whole, early",
    [(100, None, True, None), (40, None, False, None), (40, True, True, True), (40, False, False, False)],
)
def test_a_run_is_concluded_when_it_is_whole_or_was_stopped_early(tmp_path: Path, tokens, finished, whole, early):
    counters = {"step": 3, "tokens": tokens, "real_tokens": tokens, "mask_positions": 0, "seconds": 1.0, "guard": {}}
    stops = None if finished is None else lambda: finished
    seen: list[bool] = []

    def conclude(is_whole: bool) -> dict[str, str]:
        seen.append(is_whole)
        return {"checkpoint": "here"}

    summary = TrainingRun(tmp_path, RolloutConfig()).finish(counters, task(stops), conclude)
    assert seen == [whole] and summary["whole"] is whole and summary.get("stopped_early") is early
    assert summary["checkpoint"] == "here" and "guard" not in summary


def test_losses_that_need_graphs_are_refused_by_name():
    plain = {"m2t": MaskToToken()}
    refuse_graph_losses(plain, "rl.losses", "", "")
    graphs = {"c2dlm": LOSSES["c2dlm"](loss="mass")}
    with pytest.raises(ConfigError, match="rl.losses: 'c2dlm' needs causal graphs, and rollouts have none"):
        refuse_graph_losses(plain | graphs, "rl.losses", ", and rollouts have none", "leave it out")


def test_the_sums_of_a_window_are_those_of_adding_up_one_by_one():
    """Deferred to one read, they keep the order of adding and so the bits; averages count by their share."""
    sums, total, losses, share = _WindowSums(), 0.0, {"m2t": 0.0, "c2dlm": 0.0}, 0.37
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        first, second = torch.randn(2, generator=generator).mul(1e3)
        counts = torch.arange(4)
        sums.add(Outcome(first, {"m2t": first}, counts, 2 * counts, averages={"c2dlm": second}), share)
        total = total + float(first)
        total = total + share * float(second)
        losses = {"m2t": losses["m2t"] + float(first), "c2dlm": losses["c2dlm"] + share * float(second)}
    assert sums.read(torch.tensor(0.5)) == (total, losses, [[0, 5, 10, 15], [0, 10, 20, 30]], 0.5)
