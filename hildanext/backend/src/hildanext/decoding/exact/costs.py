"""What a forward costs by its number of rows, on this device: measured once, and kept beside the models."""

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
from hildanext.decoding.exact.drafting import next_drafts
from hildanext.decoding.exact.network import Network
from hildanext.decoding.exact.policy import RowCosts
from hildanext.kv_cache import BlockCache
from hildanext.kv_cache.draft_attention import DraftSegment
from hildanext.models.loading.names import models_folder

ROWS = (1, 2, 3, 4, 6, 9, 12, 16, 25, 32)
REPEATS = 8
CONTEXT = 128
"""Tokens that are cached before the rows that are timed."""


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


@torch.inference_mode()
def measure(network: Network) -> dict[int, float]:
    """Least seconds of a forward with its head, by rows; sizes take turns, so that a busy moment hits all of them.

    Where there are adapters, a third of the rows is clean and the others are masks; the head reads the clean ones and
    as many masks as were drafted at once.
    """
    cache = network.new_cache(CONTEXT + max(ROWS))
    cache.keys.zero_()
    cache.values.zero_()
    times: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for turn in range(REPEATS + 1):
        for rows in ROWS:
            begin = time.perf_counter()
            _forward(network, cache, rows)
            _wait(network.device)
            if turn > 0:  # the first turn warms up
                times[rows].append(time.perf_counter() - begin)
    return undisturbed(times)


@torch.inference_mode()
def seconds_of_one_row(network: Network) -> float:
    """The least time of a forward of the parent alone, with its head."""
    cache = network.new_cache(CONTEXT + 1)
    cache.keys.zero_()
    cache.values.zero_()
    times = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        _forward(network, cache, 1)
        _wait(network.device)
        times.append(time.perf_counter() - begin)
    return min(times)


def undisturbed(times: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """The least time of each number of rows. Fewer rows cost no more than more: whoever else is at work only adds to a
    time, so what says otherwise is lowered."""
    least: dict[int, float] = {}
    lowest = float("inf")
    for rows in sorted(times, reverse=True):
        lowest = min(lowest, *times[rows])
        least[rows] = lowest
    return dict(sorted(least.items()))


def _forward(network: Network, cache: BlockCache, rows: int) -> None:
    masks = network.places > 0 and rows > 1
    clean = (rows + 2) // 3 if masks else rows  # about the share that drafts behind every point have
    segment = DraftSegment(CONTEXT, clean, (0,) * (rows - clean), int(masks))  # groups of one: any number of rows
    hidden = network.forward([0] * clean, [cache], [segment])
    best = network.logits(hidden[:clean]).argmax(-1)
    if masks:
        next_drafts(network, hidden[None, -min(clean, rows - clean) :], best[:1])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _place(config: Any, runtime: Runtime, key: Hashable) -> Path:
    """Named for what decides the times: the machine, the versions, the model's shape."""
    facts = (
        runtime.device.type, str(runtime.dtype), runtime.threads, versions(), key,
        *(getattr(config, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")),
        cpu_name(),
    )  # fmt: skip
    name = hashlib.sha256(repr(facts).encode()).hexdigest()[:24]
    return models_folder().parent / "costs" / f"{name}.json"
