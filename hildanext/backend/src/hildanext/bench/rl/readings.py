"""What one run of the stage `rl` says of itself, from the files it wrote."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from hildanext.bench.rl.runs import outcome
from hildanext.core.errors import DataError
from hildanext.core.metrics_log import run_metrics
from hildanext.core.run_dir import read_run

TAIL = 0.1
"""Share of the last rounds that "at the end" is a mean of, where a number is of a round."""


@dataclass(frozen=True)
class Reading:
    """Of a run that came to its end."""

    seed: int
    before: Mapping[str, Any]
    """The line of its first validation."""
    after: Mapping[str, Any]
    curve: list[dict[str, float]]
    """Held-out greedy accuracy over rollouts, columns of updates, and seconds of steps."""
    entropy: tuple[float, float]
    """Of the first rounds and of the last ones, in nats a token."""
    reward: tuple[float, float]
    seconds: float
    """Of steps, without validations."""
    seconds_by_part: dict[str, float]
    rollouts: int
    columns: int
    peak_bytes: int | None
    problems: Mapping[str, Any]
    machine: Mapping[str, Any]


def read(folder: Path, seed: int) -> Reading:
    """Raises `DataError` where the files do not hold a whole run."""
    lines = run_metrics(folder)
    steps = [line for line in lines if line["kind"] == "train"]
    validations = sorted((line for line in lines if line["kind"] == "eval"), key=lambda line: line["step"])
    done, record = outcome(folder), read_run(folder)
    if done is None or record is None or not steps or len(validations) < 2:
        raise DataError(f"{folder} holds no whole run with held-out problems", "give problems.held_out above 0")
    rounds = [line for line in steps if line["update"] == 0]
    return Reading(
        seed=seed,
        before=validations[0],
        after=validations[-1],
        curve=_curve(steps, validations),
        entropy=_ends(rounds, "entropy"),
        reward=_ends(rounds, "reward"),
        seconds=float(sum(line["seconds"] for line in steps)),
        seconds_by_part={
            part: float(sum(line[f"seconds_{part}"] for line in rounds)) for part in ("rollout", "reward", "known")
        },
        rollouts=sum(line["answers"] + line["dropped"] for line in rounds),
        columns=int(sum(line["columns"] for line in steps)),
        peak_bytes=done["peak_bytes"],
        problems=record["problems"],
        machine=_computed_in(record),
    )


def _computed_in(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The machine of a run, with the dtype of its updates: the weights' own, fp32, where nothing is autocast."""
    machine: Mapping[str, Any] = record["machine"]
    plain = record.get("config", {}).get("rl", {}).get("train", {}).get("precision") == "no"
    return {**machine, "dtype": "float32"} if plain else machine


def _curve(steps: Sequence[Mapping[str, Any]], validations: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    points = []
    for validation in validations:
        until = [line for line in steps if line["step"] <= validation["step"]]
        points.append(
            {
                "step": float(validation["step"]),
                "accuracy": validation["accuracy"],
                "rollouts": float(sum(line["answers"] + line["dropped"] for line in until if line["update"] == 0)),
                "columns": float(sum(line["columns"] for line in until)),
                "seconds": float(sum(line["seconds"] for line in until)),
            }
        )
    return points


def _ends(rounds: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float]:
    count = max(1, round(TAIL * len(rounds)))
    values = [line[name] for line in rounds]
    return float(np.mean(values[:count])), float(np.mean(values[-count:]))


def greedy(line: Mapping[str, Any]) -> Float[np.ndarray, " problems"]:
    """1 where a held-out problem was solved greedily."""
    return np.array([float(mark) for mark in line["right"]])


def sampled(line: Mapping[str, Any], samples: int) -> Float[np.ndarray, " problems"]:
    """Share of each held-out problem's samples that are right."""
    return np.array([float(count) for count in line["sampled_right"].split()]) / samples
