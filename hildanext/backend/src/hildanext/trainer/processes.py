"""What the processes of a run do together: one Accelerator, the main one's work told to all, one decision for all."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from torch import Tensor

from hildanext.core.errors import CheckpointError, ConfigError, HildaError
from hildanext.core.runtime import accelerates_bf16, choose_device
from hildanext.trainer.sharded import wants_shards

Result = TypeVar("Result")


def open_accelerator(precision: str, device: str) -> Accelerator:
    """The Accelerator of a run. Its `device` is where this process computes: of several, each has its own.

    `precision` "auto" is bf16 where the device computes in it. Raises `ConfigError` where the device is not there, and
    for engines that the launcher asks for and the loop has not.
    """
    place = choose_device(device)
    if precision == "auto":
        precision = "bf16" if accelerates_bf16(place) else "no"
    if place.type == "cuda" and place.index is not None:
        torch.cuda.set_device(place)  # a process alone takes the current GPU, whatever its index
    wants_shards()  # refuses what would start and then go wrong
    _forget_another(precision, place)
    # The buffers never change; the parent's head is one of them, and sending it at every step would cost most of all.
    handler = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(mixed_precision=precision, cpu=place.type == "cpu", kwargs_handlers=[handler])
    if accelerator.device.type != place.type:
        raise ConfigError(
            f"accelerate computes on {accelerator.device.type}, not on {device!r}",
            "set another device, or unset ACCELERATE_USE_CPU and ACCELERATE_TORCH_DEVICE",
        )
    return accelerator


def _forget_another(precision: str, device: torch.device) -> None:
    """Accelerate keeps one state per Python process and refuses a second precision: an earlier run's is dropped."""
    if not AcceleratorState._shared_state:
        return
    known = AcceleratorState()
    if known.mixed_precision != precision or known.device.type != device.type:
        AcceleratorState._reset_state(reset_partial_state=True)


def on_main(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """Let the main process act while the others wait; all return its result, or all raise.

    A `HildaError` is raised by every process as it is. Anything else ends the others with a `CheckpointError`; left
    in a barrier they would wait for ever.
    """
    if accelerator.num_processes == 1:
        return action()
    result_or_error: list[Any] = [None, (CheckpointError, "the main process failed", "its own message says why")]
    if accelerator.is_main_process:
        try:
            result_or_error = [action(), None]
        except HildaError as problem:
            result_or_error[1] = (type(problem), problem.message, problem.hint)
            raise
        finally:
            broadcast_object_list(result_or_error)
    else:
        broadcast_object_list(result_or_error)
    if result_or_error[1] is not None:
        kind, message, hint = result_or_error[1]
        again: HildaError = kind.__new__(kind)  # a subclass may want other arguments
        HildaError.__init__(again, message, hint)
        raise again
    result: Result = result_or_error[0]
    return result


def summed(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The sum over all processes, on the CPU. One alone moves nothing, so its device need not know fp64 (MPS)."""
    if accelerator.num_processes == 1:
        return values
    total: Tensor = accelerator.reduce(values.to(accelerator.device), "sum").cpu()
    return total


def largest(accelerator: Accelerator, values: Mapping[str, float]) -> dict[str, float]:
    """The largest of each number over all processes, which hold the same names."""
    if accelerator.num_processes == 1 or not values:
        return dict(values)
    mine = torch.tensor([list(values.values())], dtype=torch.float64, device=accelerator.device)
    return dict(zip(values, accelerator.gather(mine).amax(0).tolist(), strict=True))


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set in any process; the same answer in all of them."""
    return bool(summed(accelerator, torch.tensor([int(flag)])).item())


def check_agreement(accelerator: Accelerator, step: int) -> None:
    """Raises `CheckpointError`, in all processes, where they are about to go on from different steps."""
    if accelerator.num_processes == 1:
        return
    steps = accelerator.gather(torch.tensor([step], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise CheckpointError(
            f"the processes found states of steps {', '.join(map(str, steps))}",
            "put the run folder on a disk that all of them see",
        )
