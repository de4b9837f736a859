"""Everything a killed run needs to go on with the same losses: weights, optimiser, counters. No pickles."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hildanext.errors import CheckpointError
from hildanext.runfolder import recover_folder, save_folder_atomically

STATE = "state"


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that learn, by name; a tied matrix appears once."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def save_state(run: Path, module: nn.Module, optimizer: torch.optim.Optimizer, counters: Mapping[str, Any]) -> None:
    """Write `run/state` whole or not at all. Raises `CheckpointError` when the disk is full."""
    parameters = trainable(module)
    slots: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for slot, value in optimizer.state.get(parameter, {}).items():
            slots[f"{slot}|{name}"] = torch.as_tensor(value).detach().cpu().contiguous()

    def write(folder: Path) -> None:
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in parameters.items()},
            folder / "weights.safetensors",
        )
        save_file(slots, folder / "optimizer.safetensors")
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
    except (OSError, json.JSONDecodeError, SafetensorError) as problem:
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
            parameter.copy_(weights[name])
    for key, value in slots.items():
        slot, _, name = key.partition("|")
        parameter = parameters[name]
        optimizer.state[parameter][slot] = value if slot == "step" else value.to(parameter.device)
    return counters
