"""Runs of the stage `rl` in processes of their own, some at a time: what is finished stays, what broke off goes on."""

import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from hildanext.bench.process_peak import peak_of_process
from hildanext.core.errors import ConfigError, HildaError
from hildanext.core.json_text import as_read_back, parse
from hildanext.core.metrics_log import to_json
from hildanext.core.registry import under_profile
from hildanext.core.run_dir import write_atomically
from hildanext.core.runtime import set_threads
from hildanext.models.tuning import start_hash
from hildanext.rl_stage2 import rl

DONE = "done.json"
"""Beside what the stage writes: that it came to its end, of which section, and at what peak."""


@dataclass(frozen=True)
class Run:
    """One method under one seed."""

    name: str
    seed: int
    folder: Path
    section: Mapping[str, Any]
    """The whole section `rl`."""

    @property
    def told(self) -> str:
        return f"{self.name}, seed {self.seed}"


def execute(
    runs: Sequence[Run], profile: str, jobs: int, threads: int, say: Callable[[str], None] | None = None
) -> dict[str, str]:
    """Bring every run to its end; returns why some did not, by folder.

    Raises `ConfigError` where a folder holds a finished run of another section or start, before anything runs.
    """
    hashes: dict[str, str] = {}
    waiting = []
    for run in runs:
        start = str(run.section["model"])
        if start not in hashes:
            hashes[start] = start_hash(start)
        if not _is_done(run, hashes[start]):
            waiting.append(run)
    failed: dict[str, str] = {}
    if say is not None and len(waiting) < len(runs):
        say(f"{len(runs) - len(waiting)} of {len(runs)} runs are done already")
    with ThreadPoolExecutor(jobs) as pool:
        futures = {
            pool.submit(_apart, run, profile, threads, hashes[str(run.section["model"])]): run for run in waiting
        }
        try:
            for number, future in enumerate(as_completed(futures), 1):
                run, (problem, seconds) = futures[future], future.result()
                if problem is not None:
                    failed[str(run.folder)] = problem
                if say is not None:
                    how = f"{seconds:.0f} s" if problem is None else problem
                    say(f"{number} of {len(waiting)}: {run.told}: {how}")
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def outcome(folder: Path) -> dict[str, Any] | None:
    """What a finished run left beside its own files; None where it did not come to its end."""
    path = folder / DONE
    return parse(path.read_bytes()) if path.is_file() else None


def _is_done(run: Run, start: str) -> bool:
    done = outcome(run.folder)
    if done is None:
        return False
    if done["section"] != as_read_back(run.section) or done["start"] != start:
        what = "section" if done["start"] == start else "start"
        raise ConfigError(f"{run.folder} holds a finished run of another {what}", "give another --out, or remove it")
    return True


def _apart(run: Run, profile: str, threads: int, start: str) -> tuple[str | None, float]:
    """One run in a process of its own: why it did not come to its end, and its seconds."""
    begun = time.perf_counter()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        try:
            problem, peak = executor.submit(_align, run, profile, threads).result()
        except BrokenProcessPool:
            problem, peak = "its process ended", None
    seconds = time.perf_counter() - begun
    if problem is None:
        done = {"section": run.section, "start": start, "peak_bytes": peak, "wall_seconds": seconds}
        write_atomically(run.folder / DONE, to_json(done, indent=2) + "\n")
    return problem, seconds


def _align(run: Run, profile: str, threads: int) -> tuple[str | None, int | None]:
    """In the process of a run, which ends with the one that started it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.getLogger("hildanext").setLevel(logging.ERROR)
    set_threads(threads)
    try:
        with under_profile(profile):
            summary = rl(run.section, run.folder, profile, quiet=True)
    except HildaError as problem:
        return str(problem), None
    return (None if summary["whole"] else "train.stop_after ended it"), peak_of_process()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
