"""Answers that were asked in one moment, with what they earned: written down as soon as they are known.

A chunk is a pure function of the weights, the problems and the seeds. So a file of it, once whole, stands for ever: a
run that is killed and comes by again samples and judges nothing twice.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hildanext.core.json_text import parse
from hildanext.core.run_dir import write_atomically
from hildanext.data.problems import Problem
from hildanext.grading.base import Reward, checked_scores
from hildanext.rl.batch import Answer, RolloutBatch


@dataclass(frozen=True)
class ToldAnswer:
    """What is known of an answer beside its arrays."""

    group: int
    """Which problem of the round it answers."""
    problem: str
    text: str
    tokens: int
    ended: bool
    forwards: int
    reward: float | None = None
    """None: it could not be judged."""
    parts: dict[str, float | None] | None = None


@dataclass(frozen=True)
class Chunk:
    """Row i of `batch` is answer i. Answers that were not whole in time are in `dropped` alone."""

    batch: RolloutBatch | None
    """None: not one answer was whole."""
    answers: list[ToldAnswer]
    dropped: int
    seconds: float
    """Of sampling."""
    judged_seconds: float = 0.0


def read_sampled(path: Path) -> Chunk | None:
    """A chunk with or without its rewards; None where it was not sampled to the end."""
    if not path.with_suffix(".json").is_file():
        return None
    told = parse(path.with_suffix(".json").read_text(encoding="utf-8"))
    batch = RolloutBatch.load(path.with_suffix(".safetensors")) if told["answers"] else None
    answers = [ToldAnswer(**answer) for answer in told["answers"]]
    return Chunk(batch, answers, told["dropped"], told["seconds"], told["judged_seconds"])


def write(path: Path, chunk: Chunk) -> None:
    """The arrays first: where the text lies, they do."""
    if chunk.batch is not None and not path.with_suffix(".safetensors").is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        chunk.batch.save(path.with_suffix(".safetensors"))
    told: dict[str, Any] = {
        "answers": [asdict(answer) for answer in chunk.answers],
        "dropped": chunk.dropped,
        "seconds": chunk.seconds,
        "judged_seconds": chunk.judged_seconds,
    }
    write_atomically(path.with_suffix(".json"), json.dumps(told, ensure_ascii=False).encode("utf-8"))


def told(answers: Sequence[Answer], problems: Sequence[Problem], group: Sequence[int]) -> list[ToldAnswer]:
    """Of whole answers, each to its problem."""
    return [
        ToldAnswer(number, problem.id, answer.text, len(answer.tokens), answer.ended, answer.forwards)
        for answer, problem, number in zip(answers, problems, group, strict=True)
    ]


def judged(answers: Sequence[ToldAnswer], problems: Sequence[Problem], reward: Reward) -> list[ToldAnswer]:
    """The answers with their rewards. Raises `RewardError` and `DataError` as `checked_scores`."""
    scores, parts = checked_scores(reward, [problem.row for problem in problems], [answer.text for answer in answers])
    return [
        ToldAnswer(
            **{**asdict(answer), "reward": score, "parts": {name: values[row] for name, values in parts.items()}}
        )
        for row, (answer, score) in enumerate(zip(answers, scores, strict=True))
    ]
