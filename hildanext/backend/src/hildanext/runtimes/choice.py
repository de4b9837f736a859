"""Which runtime `auto` is, for exact mode on a CPU: the one that takes less time for a token, with the same weights.

ONNX Runtime in fp32 computes what torch computes and rounds no weight; so where it is installed and faster it is taken.
Both are timed once for a model, a number of threads and a machine, and the times kept in the cache folder.
"""

import hashlib
import importlib.util
import json
import logging
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from hildanext.core.errors import StorageError
from hildanext.core.json_text import parse
from hildanext.core.run_dir import write_atomically
from hildanext.core.runtime import RuntimeConfig, choose_device, cpu_name, versions
from hildanext.decoding.exact.costs import seconds_of_one_row
from hildanext.decoding.exact.network import TorchNetwork
from hildanext.export.onnx_card import is_onnx_folder
from hildanext.models.draft_card import holds_drafts, read_draft_card
from hildanext.models.drafter import Drafter
from hildanext.models.loading.files import weight_files, weights_hash
from hildanext.models.loading.load import load_parent
from hildanext.models.loading.names import locate, locate_drafts, models_folder
from hildanext.models.packed_linear import pack_linears
from hildanext.runtimes.onnx_open import open_onnx

log = logging.getLogger(__name__)

SMALLEST, LARGEST = 64 << 20, 1 << 30
"""Bytes of stored weights between which `auto` looks at all: below, there is little to win, and beyond, an fp32 copy is
more than should be written unasked."""


def faster_runtime(
    name: str, config: RuntimeConfig, parent: str | None = None, adapters: bool = False
) -> RuntimeConfig:
    """`config`, but for ONNX Runtime in fp32 where that was asked by `auto` and is faster.

    `name` is a folder of draft adapters or, where no `adapters` are needed, an autoregressive model. Raises what
    loading it raises.
    """
    asked = (config.runtime, config.device, config.dtype)
    if asked[0] != "auto" or asked[1] not in ("auto", "cpu") or asked[2] not in ("auto", "fp32"):
        return config
    if is_onnx_folder(name) or choose_device(config.device).type != "cpu" or not _installed():
        return config
    if adapters and not holds_drafts(name):
        return config  # opening it says what is missing
    home = _parent(name, parent)
    if not SMALLEST <= sum(file.stat().st_size for file in _files(home)) <= LARGEST:
        return config
    onnx = replace(config, runtime="onnx", dtype="fp32")
    times = _times(name, config, onnx, parent, home)
    return onnx if times["onnx"] < times["torch"] else config


def _parent(name: str, parent: str | None) -> Path:
    if parent is None and holds_drafts(name):
        parent = read_draft_card(locate_drafts(name)).parent
    return locate(parent if parent is not None else name)


def _files(home: Path) -> list[Path]:
    return [home] if home.is_file() else list(weight_files(home))


def _installed() -> bool:
    return all(importlib.util.find_spec(package) is not None for package in ("onnx", "onnxruntime"))


def _times(name: str, config: RuntimeConfig, onnx: RuntimeConfig, parent: str | None, home: Path) -> dict[str, float]:
    """Seconds of a forward of one row in each, from the cache folder or measured now."""
    runtime = config.resolve()
    facts = (weights_hash(home), str(runtime.dtype), runtime.threads, versions(), cpu_name())
    place = models_folder().parent / "costs" / f"runtimes-{hashlib.sha256(repr(facts).encode()).hexdigest()[:24]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        stored = parse(place.read_bytes())
        return {which: float(stored[which]) for which in ("torch", "onnx")}
    causal_lm, _ = load_parent(str(home), runtime.dtype, runtime.device)
    pack_linears(causal_lm)
    times = {"torch": seconds_of_one_row(TorchNetwork(Drafter(causal_lm, None).eval()))}
    del causal_lm
    times["onnx"] = seconds_of_one_row(open_onnx(name, onnx, parent).network)
    log.warning(
        "a token of %s takes %.1f ms in ONNX Runtime (fp32) and %.1f in torch (%s): auto is %s from now on",
        name, 1000 * times["onnx"], 1000 * times["torch"], str(runtime.dtype).removeprefix("torch."),
        min(times, key=times.__getitem__),
    )  # fmt: skip
    with suppress(StorageError):  # then the next process measures again
        write_atomically(place, json.dumps(times, indent=1) + "\n")
    return times
