"""The loop and the conversion stage: normalisation, resume, guards, processes, and what happens when killed."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import hildanext.training
from conftest import random_model
from hildanext.core.errors import CheckpointError, ConfigError, TrainingStopped
from hildanext.core.metrics_log import MetricLog, read_metrics
from hildanext.core.runtime import make_generator
from hildanext.corruption.schedules import BlockPhase, LearningRate
from hildanext.losses import SupervisedStep
from hildanext.losses.mask_to_token import MaskToToken
from hildanext.models.loading.load import load_diffusion
from hildanext.trainer.config import TrainConfig
from hildanext.trainer.guard import Guard, GuardConfig
from hildanext.trainer.state import STATE
from hildanext.trainer.task import TrainingTask
from hildanext.training import train
from hildanext.wsd_stage0 import Validation, convert
from noised_examples import make_view
from training_fixtures import PHASES, change, corpus, environment, losses, small_conversion, wait_for_steps


@pytest.fixture
def sections(tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return small_conversion(tmp_path)


def test_a_conversion_leaves_a_checkpoint_that_loads(sections, tmp_path: Path):
    conversion, data = sections
    summary = convert(conversion, data, tmp_path / "run", quiet=True)
    assert summary["whole"] and summary["tokens"] >= 1280
    model, _ = load_diffusion(summary["checkpoint"])
    assert model.card.alignment == "parent" and model.card.block_size == 8
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    seen = [(line["phase"], line["block_size"]) for line in lines if line["kind"] == "train"]
    assert list(dict.fromkeys(seen)) == [("warmup", 1), ("warmup", 4), ("stable", 32), ("decay", 8)]
    assert any(line["kind"] == "eval" and np.isfinite(line["bound"]) for line in lines)
    assert list((tmp_path / "run" / "plots").glob("*.png"))


def test_what_would_fail_at_the_end_fails_before_the_first_step(sections, tmp_path: Path, monkeypatch):
    conversion, data = sections

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hildanext.models.checkpoint.save_tokenizer", full)
    with pytest.raises(CheckpointError, match="out of disk"):
        convert(conversion, data, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("stop", [1, 4, 9])
def test_a_resumed_run_has_the_losses_of_one_that_was_never_stopped(sections, tmp_path: Path, stop: int):
    conversion, data = sections
    convert(conversion, data, tmp_path / "whole", quiet=True)
    convert(change(conversion, stop_after=stop), data, tmp_path / "cut", quiet=True)
    assert len(losses(tmp_path / "cut")) == stop
    convert(conversion, data, tmp_path / "cut", quiet=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_the_loss_falls(sections, tmp_path: Path, alignment: str):
    conversion, data = sections
    phases = [{"phase": "decay", "block_size": 8, "tokens": 4000}]
    conversion = {**conversion, "alignment": alignment, "wsd": phases, "replace_rate": 0.0, "losses": [{"name": "m2t"}]}
    convert(change(conversion, learning_rate={"peak": 1e-2}), data, tmp_path / "run", quiet=True)
    curve = losses(tmp_path / "run")
    assert sum(curve[-10:]) / 10 < sum(curve[:10]) / 10 - 0.5


def test_every_switch_at_once(sections, tmp_path: Path):
    """LoRA with its parent as teacher, complementary pairs, editing, two turns, mask noise."""
    conversion, data = sections
    conversion = {
        **change(conversion, mask_noise={"deviation": 0.1, "until": 0.5}, accumulate=2),
        "losses": [{"name": name} for name in ("m2t", "t2t", "kl", "ar")],
        "lora": {"rank": 4, "alpha": 8},
        "complementary": True,
        "turns": 2,
    }
    summary = convert(conversion, data, tmp_path / "run", quiet=True)
    line = read_metrics(tmp_path / "run" / "metrics.jsonl")[-2]
    assert set(line["losses"]) == {"m2t", "t2t", "kl", "ar"}
    model, _ = load_diffusion(summary["checkpoint"])
    parent, _ = load_diffusion(summary["checkpoint"])
    assert all(torch.isfinite(p).all() for p in model.parameters()) and parent.card == model.card


def test_the_best_checkpoints_are_merged(sections, tmp_path: Path):
    conversion, data = sections
    summary = convert({**change(conversion, evaluate_every=2), "merge_top_k": 2}, data, tmp_path / "run", quiet=True)
    assert len(list((tmp_path / "run" / "best").iterdir())) == 2
    assert np.isfinite(summary["merged"]["bound"])


class Killed(BaseException):
    """What no handler stops, as a kill."""


def best_folders(run: Path) -> set[str]:
    return {folder.name for folder in (run / "best").iterdir()}


def test_a_kill_between_validation_and_save_loses_no_checkpoint_that_the_state_names(sections, tmp_path, monkeypatch):
    """Every bound is the lowest so far, so each validation drops a checkpoint; the state is saved at steps 4 and 8."""
    monkeypatch.setattr(Validation, "__call__", lambda self, step, number: {"block_size": 8, "bound": 100.0 - number})
    conversion, data = sections
    conversion = {**change(conversion, evaluate_every=1, checkpoint_every=4), "merge_top_k": 2}
    run, write = tmp_path / "run", MetricLog.write

    def killed_at_seven(log: MetricLog, **fields: Any) -> None:
        if fields["step"] == 7 and fields["kind"] == "train":
            raise Killed
        write(log, **fields)

    monkeypatch.setattr(MetricLog, "write", killed_at_seven)
    with pytest.raises(Killed):
        convert(conversion, data, run, quiet=True)
    monkeypatch.setattr(MetricLog, "write", write)
    named = json.loads((run / STATE / "counters.json").read_text())["stage"]["best"]
    assert {f"step-{step}" for _, step in named} == {"step-3", "step-4"} <= best_folders(run)
    summary = convert(conversion, data, run, quiet=True)
    last = summary["step"]
    assert "merged" in summary and best_folders(run) == {f"step-{last}", f"step-{last - 1}"}


def test_a_best_checkpoint_that_is_gone_is_ignored(sections, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Validation, "__call__", lambda self, step, number: {"block_size": 8, "bound": 1.0 * number})
    conversion, data = sections
    conversion = {**change(conversion, evaluate_every=1), "merge_top_k": 2}
    run = tmp_path / "run"
    convert(change(conversion, stop_after=3), data, run, quiet=True)
    assert best_folders(run) == {"step-1", "step-2"}
    shutil.rmtree(run / "best" / "step-1")
    assert "merged" in convert(conversion, data, run, quiet=True)
    assert best_folders(run) == {"step-2", "step-4"}


def fixed_stage(views: list[list[Any]], tokens: int) -> TrainingTask:
    return TrainingTask(
        total=tokens,
        block_phase=lambda seen: BlockPhase(phase="decay", block_size=4, tokens=tokens),
        views=lambda index, block_phase: views[index],
    )


def test_accumulation_divides_by_the_window_and_not_by_the_micro_batch(tmp_path: Path):
    """Micro-batches of different length accumulate to the loss and weights of one large batch."""
    both = make_view(length=16, batch=2, documents=[0] * 16)
    first = make_view(length=16, batch=2, documents=[0] * 5 + [-1] * 11)
    halves = [[both], [first]]
    trained = []
    for accumulate, order in ((2, halves), (2, halves[::-1])):
        model = random_model(seed=1)
        knobs = TrainConfig(accumulate=accumulate, precision="no", learning_rate=LearningRate(peak=1e-2))
        step = SupervisedStep(model, {"m2t": MaskToToken()})
        expected = sum(step(view).total.item() for [view] in halves) / (32 + 10)
        run = tmp_path / f"{len(trained)}"
        train(step, fixed_stage(order, 42), knobs, run, quiet=True)
        assert losses(run)[0] == pytest.approx(expected, rel=1e-9)
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(trained[0], trained[1], atol=1e-9)


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_checkpoint(tmp_path: Path):
    model = random_model(seed=1)
    knobs = TrainConfig(precision="no", checkpoint_every=1, learning_rate=LearningRate(peak=1e-3))
    views = [[make_view(seed=index)] for index in range(6)]
    stage = fixed_stage(views, 32 * 6)

    def poisoned(index: int, block_phase: BlockPhase) -> list[Any]:
        if index == 3:
            with torch.no_grad():
                next(model.parameters()).fill_(float("nan"))
        return views[index]

    stage.views = poisoned
    with pytest.raises(TrainingStopped, match="at step 4"):
        train(SupervisedStep(model, {"m2t": MaskToToken()}), stage, knobs, tmp_path, quiet=True)
    counters = json.loads((tmp_path / STATE / "counters.json").read_text())
    assert counters["step"] == 3


@pytest.mark.parametrize(("last", "saved"), [(7, [3]), (9, [3, 8, 9])])
def test_no_state_is_saved_while_the_loss_spikes(tmp_path: Path, monkeypatch, last: int, saved: list[int]):
    """Steps 6 and 7 meet a text of another kind. The save that is due at 6 is made up for at 8, the next calm step."""
    easy, other = make_view(seed=0), make_view(seed=3)
    views = [[other if step in (6, 7) else easy] for step in range(1, 10)]
    steps, save = [], hildanext.training.save_state
    monkeypatch.setattr(hildanext.training, "save_state", lambda *args: (steps.append(args[-1]["step"]), save(*args)))
    guard = GuardConfig(spike_factor=1.5, patience=9)
    rate = LearningRate(peak=1e-2, warmup=0.0)
    knobs = TrainConfig(precision="no", checkpoint_every=3, learning_rate=rate, guard=guard, stop_after=last)
    train(
        SupervisedStep(random_model(seed=1), {"m2t": MaskToToken()}), fixed_stage(views, 32 * 99), knobs, tmp_path, True
    )
    assert steps == saved


def test_spikes_stop_a_run_only_when_they_stay():
    guard = Guard(GuardConfig(spike_factor=2.0, patience=3, window=10))
    for step in range(10):
        guard.check(step, 4, 1.0, 1.0)
    guard.check(10, 4, 5.0, 1.0)
    guard.check(11, 4, 1.0, 1.0)
    guard.check(12, 4, 5.0, 1.0)
    guard.check(13, 4, 5.0, 1.0)
    with pytest.raises(TrainingStopped, match="above 2.0 x its median"):
        guard.check(14, 4, 5.0, 1.0)


def test_a_state_of_another_model_is_refused(tmp_path: Path):
    knobs = TrainConfig(precision="no", learning_rate=LearningRate(peak=1e-3))
    for layers, words in ((3, ""), (2, "of another model")):
        step = SupervisedStep(random_model(layers=layers), {"m2t": MaskToToken()})
        stage = fixed_stage([[make_view(seed=0)]], 32)
        if not words:
            train(step, stage, knobs, tmp_path, quiet=True)
            continue
        with pytest.raises(CheckpointError, match=words):
            train(step, stage, knobs, tmp_path, quiet=True)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"seed": 1}, "convert.seed was 0 and is 1"),
        ({"lora": {"rank": 2}}, r"convert.lora was null and is \{"),
        ({"train": {"learning_rate": {"peak": 2e-3}}}, "convert.train.learning_rate.peak was 0.001 and is 0.002"),
        ({"train": {"batch_size": 4, "clip": 2.0}}, "train.batch_size was 2 and is 4; convert.train.clip was 1.0"),
        ({"train": {"accumulate": 2}}, r"accumulate \(all processes\) was 1 and is 2"),
        ({"losses": [{"name": "m2t"}]}, "convert.losses was"),
    ],
)
def test_a_state_is_not_resumed_under_another_configuration(sections, tmp_path: Path, section, words: str):
    conversion, data = sections
    run = tmp_path / "run"
    convert(change(conversion, stop_after=2), data, run, quiet=True)
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}
    other = {**conversion, **section, "train": {**conversion["train"], **section.get("train", {})}}
    with pytest.raises(ConfigError, match=words):
        convert(other, data, run, quiet=True)
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()} == before


def test_a_state_is_not_resumed_on_other_data(sections, tmp_path: Path):
    conversion, data = sections
    convert(change(conversion, stop_after=2), data, tmp_path / "run", quiet=True)
    other = {**data, "train": str(corpus(tmp_path / "other", seed=5))}
    with pytest.raises(ConfigError, match="data.shards.train"):
        convert(conversion, other, tmp_path / "run", quiet=True)


def test_what_changes_no_number_may_change_when_a_run_is_resumed(sections, tmp_path: Path):
    conversion, data = sections
    run = tmp_path / "run"
    convert(change(conversion, stop_after=2), data, run, quiet=True)
    moved = {**data, "train": str(Path(data["train"]).rename(tmp_path / "moved"))}
    other = change(conversion, stop_after=4, checkpoint_every=7, evaluate_every=9, chunk=64, guard={"patience": 3})
    convert({**other, "device": "cpu"}, moved, run, quiet=True)
    assert len(losses(run)) == 4


def test_deleting_run_json_lets_a_state_go_on_under_another_configuration(sections, tmp_path: Path):
    conversion, data = sections
    run = tmp_path / "run"
    convert(change(conversion, stop_after=2), data, run, quiet=True)
    (run / "run.json").unlink()
    convert(change(conversion, stop_after=3, clip=0.5), data, run, quiet=True)
    assert len(losses(run)) == 3
    assert json.loads((run / "run.json").read_text())["config"]["convert"]["train"]["clip"] == 0.5


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"wsd": [{"phase": "decay", "block_size": 5, "tokens": 9}]}, "block size 5 does not divide"),
        ({"t_range": (0.9, 0.1)}, "t_range"),
        ({"losses": []}, "at least one loss"),
        ({"alignment": "block", "losses": [{"name": "ar"}]}, "leaks its labels"),
        ({"block_sise": 4}, "did you mean 'block_size'"),
        ({"seed": "many"}, "seed"),
        ({"merge_top_k": 2, "lora": {"rank": 2}}, "merge_top_k 2 with lora"),
        ({"train": {"precision": "fp16"}}, "train.precision: fp16 .* loss scaler"),
    ],
)
def test_bad_configurations_are_refused_in_one_line(sections, tmp_path: Path, section: dict[str, Any], words: str):
    conversion, data = sections
    with pytest.raises(ConfigError, match=words) as problem:
        convert({**conversion, **section}, data, tmp_path / "run", quiet=True)
    assert "\n" not in str(problem.value)


def test_draws_depend_on_the_place_in_the_run_and_not_on_how_steps_are_cut(tmp_path: Path, monkeypatch):
    """Two steps of two micro-batches, four of one: the same keys for two views of two turns, so that the processes
    of a run may share its micro-batches as they like."""
    asked: list[tuple[int, ...]] = []

    def noted(*keys: int) -> torch.Generator:
        asked.append(keys)
        return make_generator(*keys)

    monkeypatch.setattr(hildanext.training, "make_generator", noted)
    draws = []
    for accumulate in (1, 2):
        asked.clear()
        stage = fixed_stage([[make_view(seed=index), make_view(seed=9)] for index in range(4)], 4 * 32)
        stage.turns, stage.seed = 2, 7
        knobs = TrainConfig(precision="no", accumulate=accumulate, learning_rate=LearningRate(peak=1e-3))
        step = SupervisedStep(random_model(seed=1), {"m2t": MaskToToken()})
        train(step, stage, knobs, tmp_path / str(accumulate), quiet=True)
        draws.append(list(asked))
    assert draws[0] == draws[1]
    assert draws[0] == [(7, 3, index, view, turn) for index in range(4) for view in (0, 1) for turn in (0, 1)]


def test_metrics_tell_positions_and_real_tokens(sections, tmp_path: Path):
    conversion, data = sections
    convert(change(conversion, stop_after=3), data, tmp_path / "run", quiet=True)
    convert(change(conversion, stop_after=6), data, tmp_path / "run", quiet=True)
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train"]
    real = [line["real_tokens"] for line in lines]
    assert len(real) == 6 and real == sorted(real)
    assert all(0.4 * line["tokens"] < line["real_tokens"] < line["tokens"] for line in lines)


def test_generators_depend_on_every_key():
    draws = {float(torch.rand((), generator=make_generator(*keys))) for keys in ((0, 1), (1, 0), (0, 1, 0), (0, 2))}
    assert len(draws) == 4


def write_config(sections: tuple[dict[str, Any], dict[str, Any]], folder: Path) -> Path:
    conversion, data = sections
    path = folder / "run.json"
    path.write_text(json.dumps({"convert": conversion, "data": data}))
    return path


def start(config: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "hildanext.cli", "convert", "--config", str(config), "--out", str(out), "--quiet"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_losses(sections, tmp_path: Path):
    conversion, data = sections
    conversion = {**conversion, "wsd": [{**block_phase, "tokens": block_phase["tokens"] * 8} for block_phase in PHASES]}
    convert(conversion, data, tmp_path / "whole", quiet=True)
    config, run = write_config((conversion, data), tmp_path), tmp_path / "killed"
    chance = random.Random(0)
    for _ in range(6):
        process = start(config, run)
        before = len(losses(run)) if (run / "metrics.jsonl").exists() else 0
        wait_for_steps(run, before + chance.randint(2, 25), process)
        time.sleep(chance.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = start(config, run)
    out, problem = process.communicate()
    assert process.returncode == 0, problem.decode()
    assert losses(run) == losses(tmp_path / "whole")
    a, b = (load_diffusion(tmp_path / name / "checkpoint")[0] for name in ("whole", "killed"))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.slow
def test_control_c_saves_the_step_and_says_so_in_one_line(sections, tmp_path: Path):
    conversion, data = sections
    conversion = {**conversion, "wsd": [{"phase": "decay", "block_size": 8, "tokens": 200_000}]}
    config, run = write_config((conversion, data), tmp_path), tmp_path / "run"
    process = start(config, run)
    wait_for_steps(run, 4, process)
    process.send_signal(signal.SIGINT)
    _, words = process.communicate(timeout=120)
    assert process.returncode == 130 and b"Traceback" not in words
    counters = json.loads((run / STATE / "counters.json").read_text())
    assert counters["step"] == len(losses(run))


def launch(arguments: list[str]) -> subprocess.Popen[bytes]:
    """Two processes. `accelerate launch` starts several on a CPU through MPI alone; torch's launcher needs nothing."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())


def finish(launcher: subprocess.Popen[bytes], seconds: float) -> str:
    """What it said on stderr; one that hangs is told to end its processes."""
    try:
        return launcher.communicate(timeout=seconds)[1].decode()
    except subprocess.TimeoutExpired:
        launcher.terminate()
        launcher.communicate()
        raise


def launch_conversion(config: Path, run: Path) -> subprocess.Popen[bytes]:
    return launch(["-m", "hildanext.cli", "convert", "--config", str(config), "--out", str(run), "--quiet"])


EVERY_DRAW = {"complementary": True, "turns": 2, "losses": [{"name": "m2t"}, {"name": "kl"}]}


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, EVERY_DRAW], ids=["plain", "every draw"])
def test_two_processes_give_the_losses_of_one_with_doubled_accumulation(sections, tmp_path: Path, more):
    """Tolerance 1e-5 relative: the gradients are summed in another order. The second half is resumed by one process."""
    conversion, data = sections
    conversion = {**change(conversion, mask_noise={"deviation": 0.1, "until": 1.0} if more else {}), **more}
    convert(change(conversion, accumulate=2), data, tmp_path / "one", quiet=True)
    config = write_config((change(conversion, stop_after=6), data), tmp_path)
    process = launch_conversion(config, tmp_path / "two")
    words = finish(process, 300)
    assert process.returncode == 0, words[-2000:]
    convert(change(conversion, accumulate=2), data, tmp_path / "two", quiet=True)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(sections, tmp_path: Path):
    conversion, data = sections
    conversion = {**conversion, "wsd": [{"phase": "decay", "block_size": 8, "tokens": 200_000}]}
    config, run = write_config((conversion, data), tmp_path), tmp_path / "run"
    launcher = launch_conversion(config, run)
    wait_for_steps(run, 4, launcher)
    workers = {child.environ().get("RANK"): child for child in psutil.Process(launcher.pid).children()}
    workers["1"].send_signal(signal.SIGINT)
    words = finish(launcher, 120)
    # The launcher may end the second while it ends by itself: what it said counts, not its exit code.
    assert launcher.returncode != 0 and "130" in words, words[-3000:]
    assert words.count("interrupted: what was written is whole") == 2, words[-3000:]
    counters = json.loads((run / STATE / "counters.json").read_text())
    assert counters["step"] == len(losses(run))


@pytest.mark.slow
def test_what_fails_in_one_process_ends_all(tmp_path: Path):
    """See together.py for what the two do; each leaves a file of what it met."""
    process = launch([str(Path(__file__).with_name("together.py")), str(tmp_path)])
    words = finish(process, 240)
    assert process.returncode == 0, words[-3000:]
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first["value"] == second["value"] == "from 0"
    assert first["any"] == second["any"] == [True, False]
    assert first["full disk"] == second["full disk"] == "CheckpointError out of disk: free some space"
    assert first["save"] == second["save"] == "CheckpointError out of disk: free some space"
    assert first["bug"].startswith("ZeroDivisionError")
    assert second["bug"].startswith("CheckpointError the main process failed")
    assert first["apart"] == second["apart"] and "CheckpointError the processes found states of steps" in first["apart"]
    assert first["precision"] == second["precision"] == ["bf16", 2]
