"""Optimisers by name, and states that rest in the computer's memory while a GPU computes.

AdamW keeps 8 bytes of states for every weight that learns, its 8-bit form 2 (and a scale for 256 of them).
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hildanext.core.errors import ConfigError
from hildanext.models.quantize import bitsandbytes_on

OptimizerName = Literal["adamw", "adamw8bit"]
Offload = Literal["optimizer"]

SMALLEST_8BIT = 4096
"""bitsandbytes keeps the states of smaller parameters in fp32."""


def build_optimizer(
    name: OptimizerName,
    parameters: Mapping[str, nn.Parameter],
    rate: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """The optimiser over named parameters; matrices decay, vectors and embeddings do not.

    Raises `ConfigError` where bitsandbytes is needed and cannot work.

    Paper: AdamW, arXiv:1711.05101; 8-bit optimisers, arXiv:2110.02861.
    Differs: embeddings keep 8-bit states too; the paper would spare them.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for key, parameter in parameters.items():
        (decayed if parameter.ndim >= 2 and "embed" not in key else spared).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": members, "weight_decay": decay} for members, decay in ((decayed, weight_decay), (spared, 0.0))
    ]
    groups = [group for group in groups if group["params"]]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)
    package = bitsandbytes_on(groups[0]["params"][0].device)
    optimizer: torch.optim.Optimizer = package.optim.AdamW8bit(
        groups, lr=rate, betas=betas, eps=1e-8, min_8bit_size=SMALLEST_8BIT
    )
    return optimizer


def check_device(name: OptimizerName, offload: Offload | None, device: torch.device) -> None:
    """Raise `ConfigError` where the device cannot do what is asked: on a CPU there is nowhere to move states to."""
    if offload is not None and device.type != "cuda":
        raise ConfigError(
            f"offload = {offload!r} moves states off a GPU, and this run is on {device}", "leave out train.offload"
        )
    if name == "adamw8bit":
        bitsandbytes_on(device)


class OffloadedStates:
    """Optimiser states that lie in the computer's memory between steps, and on the GPU during one.

    A step then has states but no activations on the card, a forward and backward the other way round. Every step
    moves the states over the bus twice.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.optimizer, self.device = optimizer, device
        self.beds: dict[tuple[int, str], Tensor] = {}
        """Pinned memory, kept: pinning anew for every step would cost more than the copy."""

    @contextlib.contextmanager
    def onload(self) -> Iterator[None]:
        """Within the context (a step) the states are on the GPU."""
        for _, slots, name, value in self._states():
            slots[name] = value.to(self.device, non_blocking=True)
        yield
        self.offload()

    def offload(self) -> None:
        """Put the states to pinned memory."""
        for number, slots, name, value in self._states():
            if (number, name) not in self.beds:
                self.beds[number, name] = torch.empty_like(value, device="cpu").pin_memory()
            slots[name] = self.beds[number, name].copy_(value, non_blocking=True)
        torch.cuda.synchronize(self.device)  # what is saved next must be whole

    def _states(self) -> list[tuple[int, dict[str, Any], str, Tensor]]:
        """States as large as their parameters or nearly so; counters and tables stay where they are."""
        return [
            (id(parameter), slots, name, value)
            for parameter, slots in self.optimizer.state.items()
            for name, value in slots.items()
            if isinstance(value, Tensor) and value.numel() >= SMALLEST_8BIT
        ]
