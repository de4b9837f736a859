"""Everything a killed run needs to go on with the same losses: weights, optimiser, counters. No pickles."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hildanext.core.errors import CheckpointError, ConfigError
from hildanext.core.json_text import as_read_back
from hildanext.core.run_dir import RUN_FILE, read_run, recover_folder, save_folder_atomically
from hildanext.models.checkpoint import save_tensors
from hildanext.trainer.sharded import laid_like, whole_tensor

STATE = "state"
SHOWN = 60
"""Characters of a value that an error message shows."""


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that learn, by name; a tied matrix appears once."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


@dataclass(frozen=True)
class Held:
    """What a state holds in tensors, whole and in the computer's memory."""

    weights: dict[str, Tensor]
    slots: dict[str, Tensor]
    """States of the optimiser, `<slot>|<parameter>`."""


@torch.no_grad()
def gather_state(module: nn.Module, optimizer: torch.optim.Optimizer, keep: bool = True) -> Held:
    """The tensors of a state. All processes of a sharded module must call it; without `keep` one helps and holds
    nothing."""
    weights: dict[str, Tensor] = {}
    slots: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, parameter in trainable(module).items():
        whole = whole_tensor(parameter.detach())
        if keep:
            weights[name] = whole.cpu().contiguous()
        for slot, value in optimizer.state.get(parameter, {}).items():
            whole = whole_tensor(torch.as_tensor(value).detach())
            if not keep:
                continue
            plain = whole.cpu().contiguous()
            # Parameters of an 8-bit optimiser share their tables; a file holds a tensor for each name.
            slots[f"{slot}|{name}"] = plain.clone() if plain.data_ptr() in seen else plain
            seen.add(plain.data_ptr())
    return Held(weights, slots)


def save_state(run: Path, held: Held, counters: Mapping[str, Any]) -> None:
    """Write `run/state` whole or not at all. Raises `CheckpointError` when the disk is full."""

    def write(folder: Path) -> None:
        save_tensors(held.weights, folder / "weights.safetensors")
        save_tensors(held.slots, folder / "optimizer.safetensors")
        (folder / "counters.json").write_text(json.dumps(dict(counters)), encoding="utf-8")

    save_folder_atomically(run / STATE, write)


def load_state(run: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Restore in place and return the counters; None where the run has no state yet.

    Raises `CheckpointError` when the state belongs to another model or is broken.
    """
    recover_folder(run / STATE)
    folder = run / STATE
    if not folder.is_dir():
        return None
    try:
        counters: dict[str, Any] = json.loads((folder / "counters.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "weights.safetensors")
        slots = load_file(folder / "optimizer.safetensors")
    except (OSError, ValueError, RecursionError, SafetensorError) as problem:
        raise CheckpointError(f"{folder} is broken ({problem})", "delete it to start the run anew") from None
    parameters = trainable(module)
    if weights.keys() != parameters.keys():
        odd = sorted(weights.keys() ^ parameters.keys())[:3]
        raise CheckpointError(
            f"{folder} is of another model (differs in {', '.join(odd)})", "choose another run folder"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != weights[name].shape:
                raise CheckpointError(f"{folder}: {name} has another shape", "choose another run folder")
            parameter.copy_(laid_like(weights[name], parameter))
    _restore_slots(optimizer, parameters, slots)
    return counters


def _restore_slots(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], slots: Mapping[str, Tensor]
) -> None:
    """Through the optimiser's own `load_state_dict`, which knows what belongs beside the parameter (a fused AdamW's
    `step` does, a plain one's stays on the CPU)."""
    known = optimizer.state_dict()
    numbers: dict[int, int] = {}
    for group, packed in zip(optimizer.param_groups, known["param_groups"], strict=True):
        numbers.update(zip((id(parameter) for parameter in group["params"]), packed["params"], strict=True))
    state: dict[int, dict[str, Tensor | int]] = {}
    for key, value in slots.items():
        slot, _, name = key.partition("|")
        counts = value.ndim == 0 and value.dtype == torch.int64  # a plain integer, as bitsandbytes counts its steps
        parameter = parameters[name]
        like = value.shape == parameter.shape and value.ndim > 0
        restored = laid_like(value, parameter) if like else value
        state.setdefault(numbers[id(parameter)], {})[slot] = int(value) if counts else restored
    optimizer.load_state_dict({"state": state, "param_groups": known["param_groups"]})


def check_resumes(
    run: Path, record: Mapping[str, Any], comparable: Callable[[Mapping[str, Any]], Mapping[str, Any]]
) -> None:
    """Refuse to go on from a state that was reached under another configuration or on other data.

    `record` is what `run.json` is about to say. `comparable` takes what decides the numbers out of it, and out of the
    `run.json` that is there. A folder without a state, or whose `run.json` was deleted, is not compared; nothing is
    written. Raises `ConfigError` naming every key that differs.
    """
    has_state = any((run / name).is_dir() for name in (STATE, f"{STATE}.old"))
    if not has_state or not (run / RUN_FILE).exists():
        return
    there, here = (as_read_back(comparable(mapping)) for mapping in (read_run(run) or {}, record))
    differences = [f"{key} was {_show(old)} and is {_show(new)}" for key, old, new in _differences(there, here)]
    if differences:
        raise ConfigError(
            f"{str(run)!r} holds the state of another run: {'; '.join(differences)}",
            f"set that back or give another folder (to go on under the new values all the same, delete its {RUN_FILE})",
        )


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Dotted key and both values, wherever two mappings differ; None stands for a key that is not there."""
    for key in [*there, *(key for key in here if key not in there)]:
        old, new = there.get(key), here.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from ((f"{key}.{inner}", *values) for inner, *values in _differences(old, new))  # type: ignore[misc]
        elif old != new:
            yield key, old, new


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
