"""Two processes, started by a test: what one meets, the other must meet too. Each writes `rank-<n>.json`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import hildanext.training
from conftest import random_model
from hildanext.core.errors import CheckpointError
from hildanext.corruption.schedules import BlockPhase, LearningRate
from hildanext.losses import SupervisedStep
from hildanext.losses.mask_to_token import MaskToToken
from hildanext.trainer.config import TrainConfig
from hildanext.trainer.processes import any_process, on_main, open_accelerator
from hildanext.trainer.task import TrainingTask
from hildanext.training import train
from noised_examples import make_view


def met(action: Callable[[], Any]) -> str:
    try:
        return str(action())
    except (CheckpointError, ZeroDivisionError) as problem:
        return f"{type(problem).__name__} {problem}"


def full_disk(*_: Any) -> None:
    raise CheckpointError("out of disk", "free some space")


def two_steps(run: Path, precision: str = "no", stop_after: int | None = None) -> dict[str, Any]:
    stage = TrainingTask(
        total=4 * 32,
        block_phase=lambda seen: BlockPhase(phase="decay", block_size=4, tokens=4 * 32),
        views=lambda index, block_phase: [make_view(seed=index)],
    )
    knobs = TrainConfig(precision=precision, learning_rate=LearningRate(peak=1e-3), stop_after=stop_after)
    model = random_model(seed=1, dtype=torch.float32)
    return train(SupervisedStep(model, {"m2t": MaskToToken()}), stage, knobs, run, quiet=True)


def main(folder: Path) -> None:
    accelerator = open_accelerator("no", "cpu")
    rank = accelerator.process_index
    report: dict[str, Any] = {
        "value": on_main(accelerator, lambda: f"from {rank}"),
        "any": [any_process(accelerator, rank == 1), any_process(accelerator, False)],
        "full disk": met(lambda: on_main(accelerator, full_disk)),
        "bug": met(lambda: on_main(accelerator, lambda: 1 // 0)),
    }
    save = hildanext.training.save_state
    hildanext.training.save_state = full_disk
    report["save"] = met(lambda: two_steps(folder / "full"))
    hildanext.training.save_state = save
    two_steps(folder / "apart-0", stop_after=1)
    report["apart"] = met(lambda: two_steps(folder / f"apart-{rank}"))
    counters = two_steps(folder / "bf16", "bf16")
    report["precision"] = [open_accelerator("bf16", "cpu").mixed_precision, counters["step"]]
    (folder / f"rank-{rank}.json").write_text(json.dumps(report))
    accelerator.end_training()


main(Path(sys.argv[1]))
