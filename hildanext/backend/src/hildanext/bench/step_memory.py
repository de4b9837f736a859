"""What a training step takes: what lies there between steps, and the most that one adds to it."""

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

STATUS, PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def standing_bytes(module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Of weights, buffers and the optimiser's states; a tied matrix counts once."""
    states = [value for slots in optimizer.state.values() for value in slots.values() if isinstance(value, Tensor)]
    tensors = {tensor.data_ptr(): tensor for tensor in (*module.parameters(), *module.buffers(), *states)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def added_bytes(step: Callable[[], object], device: torch.device) -> int | None:
    """The most memory beyond what is there before `step`, gradients included; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what is free is handed back, or it would hide what the step takes
    try:
        PEAK.write_text("5")  # the peak begins anew: Linux, `man 5 proc`
    except OSError:
        return None
    before = _kilobytes("VmRSS")
    step()
    return 1024 * max(_kilobytes("VmHWM") - before, 0)


def _kilobytes(name: str) -> int:
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
