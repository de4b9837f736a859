"""Optimisers by name, and states that rest in the computer's memory while a GPU computes.

AdamW keeps 8 bytes of states for every weight that learns, its 8-bit form 2 (and a scale for 256 of them).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from hildanext.errors import ConfigError
from hildanext.models.quantize import bitsandbytes_on

OptimizerName = Literal["adamw", "adamw8bit"]
Offload = Literal["optimizer"]

SMALLEST_8BIT = 4096
"""bitsandbytes keeps the states of smaller parameters in fp32."""


def build_optimizer(
    name: OptimizerName,
    groups: Sequence[Mapping[str, Any]],
    rate: float,
    betas: tuple[float, float],
    device: torch.device,
) -> torch.optim.Optimizer:
    """The optimiser over parameter groups. Raises `ConfigError` where bitsandbytes is needed and cannot work.

    Paper: AdamW, arXiv:1711.05101; 8-bit optimisers, arXiv:2110.02861.
    Differs: embeddings keep 8-bit states too; the paper would spare them.
    """
    if name == "adamw":
        return torch.optim.AdamW(list(groups), lr=rate, betas=betas, fused=True)
    found: torch.optim.Optimizer = bitsandbytes_on(device).optim.AdamW8bit(
        list(groups), lr=rate, betas=betas, eps=1e-8, min_8bit_size=SMALLEST_8BIT
    )
    return found


class RestingStates:
    """Optimiser states that lie in the computer's memory between steps, and on the GPU during one.

    A step then has states but no activations on the card, a forward and backward the other way round. What is moved
    costs two passes over the bus for every step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        """Raises `ConfigError` on a CPU, where there is nowhere to move to."""
        if device.type != "cuda":
            raise ConfigError(
                f"offload = 'optimizer' moves states off a GPU, and this run is on {device}", "leave out train.offload"
            )
        self.optimizer, self.device = optimizer, device
        self.beds: dict[tuple[int, str], Tensor] = {}
        """Pinned memory, kept: pinning anew for every step would cost more than the copy."""

    def wake(self) -> None:
        """Before a step: states to the GPU."""
        for _, slots, name, value in self._states():
            slots[name] = value.to(self.device, non_blocking=True)

    def rest(self) -> None:
        """After a step: states to pinned memory."""
        for key, slots, name, value in self._states():
            if (key, name) not in self.beds:
                self.beds[key, name] = torch.empty_like(value, device="cpu").pin_memory()
            slots[name] = self.beds[key, name].copy_(value, non_blocking=True)
        torch.cuda.synchronize(self.device)  # the copies must be whole before the GPU's own memory is used again

    def _states(self) -> list[tuple[int, dict[str, Any], str, Tensor]]:
        """States as large as their parameters or nearly so; counters and tables stay where they are."""
        return [
            (id(parameter), slots, name, value)
            for parameter, slots in self.optimizer.state.items()
            for name, value in slots.items()
            if isinstance(value, Tensor) and value.numel() >= SMALLEST_8BIT
        ]
