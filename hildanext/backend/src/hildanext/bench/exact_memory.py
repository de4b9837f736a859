"""Peak memory of a way to write: in a process of its own, which opens what that way needs and writes one answer."""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from hildanext.bench.exact_ways import Opened, Way, WaySettings
from hildanext.bench.process_peak import peak_of_process
from hildanext.core.errors import HildaError


def peak_bytes(settings: WaySettings, way: Way, prompt: Sequence[int], new: int) -> int | None:
    """None where the process did not get through, or the system does not tell."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        try:
            return executor.submit(_peak, settings, way, list(prompt), new).result()
        except (BrokenProcessPool, HildaError, MemoryError):
            return None


def _peak(settings: WaySettings, way: Way, prompt: list[int], new: int) -> int | None:
    Opened(settings).writer(way)(prompt, new)
    return peak_of_process()
