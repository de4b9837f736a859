"""Every way on every prompt, in turns; what each wrote of a part of the prompts is a file, and is not written again.

A turn is a seed and a part of the prompts: all ways write it one after another, each turn beginning with another way,
so that a busy machine slows all alike.
"""

import hashlib
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hildanext.ar import Parent
from hildanext.bench.acceleration.ways import Way, Write
from hildanext.core.errors import HildaError
from hildanext.core.json_text import BadJson, parse
from hildanext.core.metrics_log import to_json
from hildanext.core.progress import Repeats
from hildanext.core.run_dir import write_atomically
from hildanext.eval.generation import generative_nats

Say = Callable[[str], None]
Answer = Mapping[str, Any]


@dataclass
class Written:
    """What a way wrote, by seed and prompt."""

    way: Way
    answers: dict[int, list[Answer]] = field(default_factory=dict)
    """Of each seed: the prompts in their order."""
    sessions: set[str] = field(default_factory=set)
    """The processes in which it did."""
    refused: str | None = None
    """Why nobody writes so: what opening it said."""


@dataclass(frozen=True)
class Turns:
    """What is asked of all ways."""

    prompts: Sequence[Sequence[int]]
    seeds: Sequence[int]
    part: int
    """Prompts of a turn."""
    facts: Mapping[str, Any]
    """What decides the numbers beside a way and its prompts: weights, machine."""
    folder: Path | None = None
    """Of the cells; None keeps none."""
    batch: int = 1
    """Prompts that are written together."""

    def parts(self) -> list[range]:
        count = len(self.prompts)
        return [range(first, min(first + self.part, count)) for first in range(0, count, self.part)]


def write_all(
    ways: Sequence[Way],
    open_way: Callable[[Way], Write],
    parent: Parent,
    turns: Turns,
    say: Say | None,
    tolerant: bool = False,
) -> list[Written]:
    """Every way's answers; greedy ways write under the first seed alone, the parent (whose time the others are set
    beside) in every turn. What a whole cell holds is read, and its model is opened only where something is missing.

    Raises what `open_way` raises; where `tolerant`, a way that it refuses (`HildaError`) has no answers, and says why.
    """
    session, written = uuid.uuid4().hex[:12], [Written(way) for way in ways]
    writers: dict[int, Write] = {}
    rounds = [(seed, part) for seed in turns.seeds for part in turns.parts()]
    repeats = Repeats(len(rounds), say)
    for number, (seed, part) in enumerate(rounds):
        for at in range(len(ways)):
            one = written[(number + at) % len(ways)]
            greedy = not one.way.sampled and one.way.section is not None
            if one.refused is not None or (greedy and seed != turns.seeds[0]):
                continue
            path = _cell(turns, one.way, seed, part)
            cell = _read(path)
            if cell is None:
                write = _opened(one, writers, open_way, tolerant)
                if write is None:
                    continue
                cell = {"way": one.way.name, "session": session, **_written(write, parent, turns, seed, part)}
                if path is not None:
                    write_atomically(path, to_json(cell) + "\n")
            one.answers.setdefault(seed, []).extend(cell["answers"])
            one.sessions.add(cell["session"])
        repeats.done(number + 1)
    return written


def _opened(one: Written, writers: dict[int, Write], open_way: Callable[[Way], Write], tolerant: bool) -> Write | None:
    """Who writes one way; None where it is refused."""
    if id(one) not in writers:
        try:
            writers[id(one)] = open_way(one.way)
        except HildaError as problem:
            if not tolerant:
                raise
            one.refused = str(problem)
    return writers.get(id(one))


def _written(write: Write, parent: Parent, turns: Turns, seed: int, part: range) -> dict[str, Any]:
    answers = []
    for first in range(part.start, part.stop, turns.batch):
        indices = range(first, min(first + turns.batch, part.stop))
        prompts = [list(turns.prompts[index]) for index in indices]
        for index, prompt, answer in zip(indices, prompts, write(prompts, seed * 1_000_003 + first), strict=True):
            tokens = answer["tokens"]
            # Behind the clock: what the text is worth is no part of what it costs.
            nats = generative_nats(parent, [prompt], [tokens]) * len(tokens) if tokens else 0.0
            answers.append({"prompt": index, **answer, "nats": nats})
    return {"answers": answers}


def _cell(turns: Turns, way: Way, seed: int, part: range) -> Path | None:
    """The file of a cell: its name says everything that decides what stands in it."""
    if turns.folder is None:
        return None
    asked = [list(turns.prompts[index]) for index in part]
    identity = json.dumps(
        [way.identity(), seed, part.start, asked, turns.batch, dict(turns.facts)], sort_keys=True, default=str
    )
    return turns.folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.json"


def _read(path: Path | None) -> dict[str, Any] | None:
    """What a cell holds; None where there is none, or a broken one, which is written again."""
    try:
        cell = parse(path.read_bytes()) if path is not None else None
    except (FileNotFoundError, BadJson):
        return None
    return cell if isinstance(cell, dict) and "answers" in cell else None
