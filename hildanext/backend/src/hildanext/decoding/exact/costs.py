"""What a step of decoding costs by the rows of its forward, on this device: measured once, kept beside the models."""

import hashlib
import json
import time
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from hildanext.core.errors import StorageError
from hildanext.core.json_text import parse
from hildanext.core.run_dir import write_atomically
from hildanext.core.runtime import Runtime, cpu_name, versions
from hildanext.decoding.exact.expected import PARENT, Placement, all_points, last_point
from hildanext.decoding.exact.network import Network
from hildanext.decoding.exact.policy import ExactConfig, Placing, RowCosts
from hildanext.decoding.exact.state import ExactRow, ExactState
from hildanext.models.loading.names import models_folder

REPEATS = 8
CONTEXT = 130
"""Tokens before the drafts."""
MOST = 5
"""Drafts at a time, at most; larger forwards are extrapolated."""
LOOKED_UP = (1, 2, 3, 5, 8, 11, 15, 31)
"""Drafts at a time where they cost a row each."""


def row_costs(network: Network, runtime: Runtime) -> RowCosts:
    """From the cache folder, or measured now (a second or two) and put there."""
    config, key = network.causal_lm.config, network.costs_key
    stored = stored_costs(config, runtime, key)
    if stored is not None:
        return stored
    measured = measure(network)
    with suppress(StorageError):  # then the next process measures again
        write_atomically(_place(config, runtime, key), json.dumps({"seconds": measured}, indent=1) + "\n")
    return RowCosts(measured)


def stored_costs(config: Any, runtime: Runtime, key: Hashable) -> RowCosts | None:
    """From the cache folder, of a parent's `config` and a network's `costs_key`; None: not there, or not whole."""
    try:
        stored = parse(_place(config, runtime, key).read_bytes())
        return RowCosts({int(rows): float(seconds) for rows, seconds in stored["seconds"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def measure(network: Network) -> dict[int, float]:
    """Least seconds of a step of decoding, by the rows of its forward; sizes take turns, so that a busy moment hits all
    of them."""
    return undisturbed(_timed(network, _placements(network.places)))


def seconds_of_one_row(network: Network) -> float:
    """The least time of a step of the parent alone."""
    return min(_timed(network, [PARENT])[1])


def undisturbed(times: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """The least time of each number of rows. Fewer rows cost no more than more: whoever else is at work only adds to a
    time, so what says otherwise is lowered."""
    least: dict[int, float] = {}
    lowest = float("inf")
    for rows in sorted(times, reverse=True):
        lowest = min(lowest, *times[rows])
        least[rows] = lowest
    return dict(sorted(least.items()))


class _Told(Placing):
    """The placement that it is told."""

    placement = PARENT

    def choose(self, row: ExactRow, rows: int = 1) -> Placement:
        return self.placement


def _placements(places: int) -> list[Placement]:
    """Of all sizes that are asked for; where nobody has learnt to draft, drafts are looked up."""
    if not places:
        return [PARENT, *(Placement(drafts, ()) for drafts in LOOKED_UP)]
    drafted = range(1, min(places, MOST) + 1)
    return [PARENT, *(way(drafts) for drafts in drafted for way in (last_point, all_points))]


def _timed(network: Network, placements: Sequence[Placement]) -> dict[int, list[float]]:
    """Seconds of steps behind a context of zeros, whose drafts are the first token."""
    most = max(placement.drafts for placement in placements)
    placing = _Told(ExactConfig(after="all", drafter="adapters" if network.places else "ngram"), most)
    state = ExactState(network, placing.config, placing, lambda row: False)
    row = state.row([0] * CONTEXT, CONTEXT + most + 2, 0, 0)
    row.cache.keys.zero_()
    row.cache.values.zero_()
    row.cache.commit(CONTEXT - 1)
    state.rows.append(row)
    times: dict[int, list[float]] = {placement.rows: [] for placement in placements}
    for turn in range(REPEATS + 1):
        for placement in placements:
            placing.placement = placement
            row.tokens, row.drafts = row.tokens[:CONTEXT], [0] * placement.drafts
            row.cache.truncate(CONTEXT - 1)
            begin = time.perf_counter()
            state.step()
            _wait(network.device)
            if turn > 0:  # the first turn warms up
                times[placement.rows].append(time.perf_counter() - begin)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _place(config: Any, runtime: Runtime, key: Hashable) -> Path:
    """Named for what decides the times: the machine, the versions, the model's shape."""
    facts = (
        "step", runtime.device.type, str(runtime.dtype), runtime.threads, versions(), key,
        *(getattr(config, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")),
        cpu_name(),
    )  # fmt: skip
    name = hashlib.sha256(repr(facts).encode()).hexdigest()[:24]
    return models_folder().parent / "costs" / f"{name}.json"
