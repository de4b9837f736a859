"""What a step of decoding costs by the rows of its forward, on this device: a first measure, kept beside the models."""

import hashlib
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from hildanext.core.errors import StorageError
from hildanext.core.json_text import parse
from hildanext.core.run_dir import write_atomically
from hildanext.core.runtime import Runtime, cpu_name, versions
from hildanext.decoding.exact.expected import PARENT, Placement, all_points, last_point
from hildanext.decoding.exact.network import Network, network_of
from hildanext.decoding.exact.policy import ExactConfig, OnePlacement
from hildanext.decoding.exact.row_costs import RowCosts, RunningCosts
from hildanext.decoding.exact.state import ExactState
from hildanext.models.drafter import Drafter
from hildanext.models.loading.names import models_folder

REPEATS = 8
"""Turns of all sizes at least ..."""
CALM = 4
"""... and until so many have found no size quicker ..."""
SETTLED = 0.01
"""... by this share; ..."""
PATIENCE = 4.0
"""... or for so many seconds."""
CONTEXT = 130
"""Tokens before the drafts."""
MOST = 5
"""Drafts at a time, at most; larger forwards are extrapolated."""
LOOKED_UP = (1, 2, 3, 5, 8, 11, 15, 31)
"""Drafts at a time where they cost a row each."""

_running: WeakKeyDictionary[Drafter | Network, dict[Hashable, RunningCosts]] = WeakKeyDictionary()


def running_costs(drafter: Drafter | Network, runtime: Runtime, who: str) -> RunningCosts:
    """Shared by all who decode with that drafter and the same `ExactConfig.drafter` (`who`): drafts that were looked up
    cost other than masks. Begun with `row_costs`."""
    shared = _running.setdefault(drafter, {})
    if (runtime, who) not in shared:
        shared[runtime, who] = RunningCosts(row_costs(network_of(drafter), runtime))
    return shared[runtime, who]


def row_costs(network: Network, runtime: Runtime) -> RowCosts:
    """From the cache folder, or measured now (some seconds) and put there."""
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


def _placements(places: int) -> list[Placement]:
    """Of all sizes that are asked for; where nobody has learnt to draft, drafts are looked up."""
    if not places:
        return [PARENT, *(Placement(drafts, ()) for drafts in LOOKED_UP)]
    drafted = range(1, min(places, MOST) + 1)
    return [PARENT, *(way(drafts) for drafts in drafted for way in (last_point, all_points))]


class _Watched(OnePlacement):
    """Remembers what each step took, as running costs are told of it."""

    seconds = 0.0

    def took(self, rows: int, fed: int, seconds: float) -> None:
        self.seconds = seconds


def _timed(network: Network, placements: Sequence[Placement]) -> dict[int, list[float]]:
    """Seconds of steps behind a context of zeros, whose drafts are the first token."""
    most = max(placement.drafts for placement in placements)
    config = ExactConfig(after="all", drafter="adapters" if network.places else "ngram")
    placing = _Watched(config, PARENT, most)
    state = ExactState(network, config, placing, lambda row: False)
    row = state.row([0] * CONTEXT, CONTEXT + most + 2, 0, 0)
    row.cache.keys.zero_()
    row.cache.values.zero_()
    row.cache.commit(CONTEXT - 1)
    state.rows.append(row)

    def turn() -> list[tuple[int, float]]:
        took = []
        for placing.placement in placements:
            drafts = placing.placement.drafts
            row.tokens, row.drafts = row.tokens[:CONTEXT], [0] * drafts
            row.cache.truncate(CONTEXT - 1)
            state.step()
            took.append((placing.placement.rows, placing.seconds))
        return took

    turn()  # warms up
    return in_turns(turn)


def in_turns(turn: Callable[[], Sequence[tuple[int, float]]]) -> dict[int, list[float]]:
    """Rows and seconds of steps, turn by turn, until no size becomes quicker any more."""
    times: dict[int, list[float]] = {}
    turns = calm = 0
    spent = 0.0
    while turns < REPEATS or (calm < CALM and spent < PATIENCE):
        calm += 1
        for rows, seconds in turn():
            before = times.setdefault(rows, [])
            if before and seconds < (1.0 - SETTLED) * min(before):
                calm = 0
            before.append(seconds)
            spent += seconds
        turns += 1
    return times


def _place(config: Any, runtime: Runtime, key: Hashable) -> Path:
    """Named for what decides the times: the machine, the versions, the model's shape."""
    facts = (
        "step", runtime.device.type, str(runtime.dtype), runtime.threads, versions(), key,
        *(getattr(config, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")),
        cpu_name(),
    )  # fmt: skip
    name = hashlib.sha256(repr(facts).encode()).hexdigest()[:24]
    return models_folder().parent / "costs" / f"{name}.json"
