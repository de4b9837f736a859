"""The loop and the conversion stage: normalisation, resume, guards, processes, and what happens when killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import random_model
from hildanext.datasets import PrepareKnobs, prepare
from hildanext.errors import CheckpointError, ConfigError, TrainingStopped
from hildanext.log import read_metrics
from hildanext.loop.guard import Guard, GuardKnobs
from hildanext.loop.state import STATE
from hildanext.models.load import load_diffusion
from hildanext.schedules import LearningRate, Rung
from hildanext.supervision import SupervisedStep
from hildanext.supervision.mask_to_token import MaskToToken
from hildanext.training import Stage, TrainKnobs, make_generator, train
from hildanext.wsd_stage0 import convert
from small_models import small_parent, small_tokenizer

RUNGS = [
    {"phase": "warmup", "block_size": 1, "tokens": 256},
    {"phase": "warmup", "block_size": 4, "tokens": 256},
    {"phase": "stable", "block_size": 32, "tokens": 256},
    {"phase": "decay", "block_size": 8, "tokens": 512},
]


def corpus(folder: Path, documents: int = 40, seed: int = 0) -> Path:
    numbers = np.random.default_rng(seed)
    texts = [numbers.integers(3, 60, int(numbers.integers(4, 40))).tolist() for _ in range(documents)]
    prepare(PrepareKnobs(source={"name": "list"}, out=str(folder)), small_tokenizer(), documents=texts)
    return folder


@pytest.fixture
def sections(tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    data = {"train": str(corpus(tmp_path / "train")), "valid": str(corpus(tmp_path / "valid", 6, 1))}
    data |= {"sequence_length": 32, "pad_to_block": 8}
    conversion = {
        "parent": str(small_parent(tmp_path / "parent")),
        "block_size": 8,
        "wsd": RUNGS,
        "valid_rows": 4,
        "train": {
            "batch_size": 2,
            "precision": "no",
            "learning_rate": {"peak": 1e-3},
            "checkpoint_every": 3,
            "evaluate_every": 5,
        },
    }
    return conversion, data


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"]


def change(conversion: dict[str, Any], **train_fields: Any) -> dict[str, Any]:
    return {**conversion, "train": {**conversion["train"], **train_fields}}


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


@pytest.mark.parametrize("stop", [1, 4, 9])
def test_V22_a_resumed_run_has_the_losses_of_one_that_was_never_stopped(sections, tmp_path: Path, stop: int):
    conversion, data = sections
    convert(conversion, data, tmp_path / "whole", quiet=True)
    convert(change(conversion, stop_after=stop), data, tmp_path / "cut", quiet=True)
    assert len(losses(tmp_path / "cut")) == stop
    convert(conversion, data, tmp_path / "cut", quiet=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_the_loss_falls(sections, tmp_path: Path, alignment: str):
    conversion, data = sections
    rungs = [{"phase": "decay", "block_size": 8, "tokens": 4000}]
    conversion = {**conversion, "alignment": alignment, "wsd": rungs, "replace_rate": 0.0, "losses": [{"name": "m2t"}]}
    convert(change(conversion, learning_rate={"peak": 1e-2}), data, tmp_path / "run", quiet=True)
    found = losses(tmp_path / "run")
    assert sum(found[-10:]) / 10 < sum(found[:10]) / 10 - 0.5


def test_every_switch_at_once(sections, tmp_path: Path):
    """LoRA with its parent as teacher, complementary pairs, editing, two turns, mask noise, merge."""
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


def fixed_stage(views: list[list[Any]], tokens: int) -> Stage:
    return Stage(
        total_tokens=tokens,
        rung=lambda seen: Rung(phase="decay", block_size=4, tokens=tokens),
        views=lambda index, rung: views[index],
    )


def test_accumulation_divides_by_the_window_and_not_by_the_micro_batch(tmp_path: Path):
    """Micro-batches of different length accumulate to the loss and weights of one large batch."""
    from test_supervision import make_view

    both = make_view(length=16, batch=2, documents=[0] * 16)
    first = make_view(length=16, batch=2, documents=[0] * 5 + [-1] * 11)
    halves = [[both], [first]]
    found = []
    for accumulate, order in ((2, halves), (2, halves[::-1])):
        model = random_model(seed=1)
        knobs = TrainKnobs(accumulate=accumulate, precision="no", learning_rate=LearningRate(peak=1e-2))
        step = SupervisedStep(model, {"m2t": MaskToToken()})
        expected = sum(step(view).total.item() for [view] in halves) / (32 + 10)
        run = tmp_path / f"{len(found)}"
        train(step, fixed_stage(order, 42), knobs, run, quiet=True)
        assert losses(run)[0] == pytest.approx(expected, rel=1e-9)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(found[0], found[1], atol=1e-9)


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_checkpoint(tmp_path: Path):
    from test_supervision import make_view

    model = random_model(seed=1)
    knobs = TrainKnobs(precision="no", checkpoint_every=1, learning_rate=LearningRate(peak=1e-3))
    views = [[make_view(seed=index)] for index in range(6)]
    stage = fixed_stage(views, 32 * 6)

    def poisoned(index: int, rung: Rung) -> list[Any]:
        if index == 3:
            with torch.no_grad():
                next(model.parameters()).fill_(float("nan"))
        return views[index]

    stage.views = poisoned
    with pytest.raises(TrainingStopped, match="at step 4"):
        train(SupervisedStep(model, {"m2t": MaskToToken()}), stage, knobs, tmp_path, quiet=True)
    counters = json.loads((tmp_path / STATE / "counters.json").read_text())
    assert counters["step"] == 3


def test_spikes_stop_a_run_only_when_they_stay():
    guard = Guard(GuardKnobs(spike_factor=2.0, patience=3, window=10))
    for step in range(10):
        guard.check(step, 4, 1.0, 1.0)
    guard.check(10, 4, 5.0, 1.0)
    guard.check(11, 4, 1.0, 1.0)
    guard.check(12, 4, 5.0, 1.0)
    guard.check(13, 4, 5.0, 1.0)
    with pytest.raises(TrainingStopped, match="above 2.0 x its median"):
        guard.check(14, 4, 5.0, 1.0)


def test_a_state_of_another_model_is_refused(sections, tmp_path: Path):
    conversion, data = sections
    convert(change(conversion, stop_after=2), data, tmp_path / "run", quiet=True)
    with pytest.raises(CheckpointError, match="another"):
        convert({**conversion, "lora": {"rank": 2}}, data, tmp_path / "run", quiet=True)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"wsd": [{"phase": "decay", "block_size": 5, "tokens": 9}]}, "block size 5 does not divide"),
        ({"t_range": (0.9, 0.1)}, "t_range"),
        ({"losses": []}, "at least one loss"),
        ({"alignment": "block", "losses": [{"name": "ar"}]}, "leaks its labels"),
        ({"block_sise": 4}, "did you mean 'block_size'"),
        ({"seed": "many"}, "seed"),
    ],
)
def test_bad_configurations_are_refused_in_one_line(sections, tmp_path: Path, section: dict[str, Any], words: str):
    conversion, data = sections
    with pytest.raises(ConfigError, match=words) as problem:
        convert({**conversion, **section}, data, tmp_path / "run", quiet=True)
    assert "\n" not in str(problem.value)


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


def environment() -> dict[str, str]:
    import hildanext

    return {**os.environ, "PYTHONPATH": str(Path(hildanext.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def wait_for_steps(run: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= count:
            return
        time.sleep(0.005)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_losses(sections, tmp_path: Path):
    conversion, data = sections
    conversion = {**conversion, "wsd": [{**rung, "tokens": rung["tokens"] * 8} for rung in RUNGS]}
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


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_with_doubled_accumulation(sections, tmp_path: Path):
    """Tolerance 1e-5 relative: the gradients are summed in another order."""
    conversion, data = sections
    convert(change(conversion, accumulate=2), data, tmp_path / "one", quiet=True)
    config = write_config((conversion, data), tmp_path)
    # `accelerate launch` starts several CPU processes through MPI only; torch's own launcher needs nothing.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "hildanext.cli"]
    command += ["convert", "--config", str(config), "--out", str(tmp_path / "two"), "--quiet"]
    done = subprocess.run(command, capture_output=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
