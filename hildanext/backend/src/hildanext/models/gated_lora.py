"""LoRA with a gate: noisy rows are adapted, clean rows take the frozen parent's own path.

Rows lie clean ones first, so that the gate is one number. A clean row's product is the base layer's alone; nothing is
added to it, not even zero: its numbers are the parent's bit for bit.

Paper: gated LoRA multi-token prediction, arXiv:2507.11851. Differs: the gate switches whole rows of a diffusion block,
which see each other both ways, and the file format is peft's.
"""

import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from hildanext.core.config import config
from hildanext.core.errors import ConfigError
from hildanext.models.kept_copies import KeptCopies

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Layers that read the same rows, in the order in which they do."""


@config
class GatedLoraConfig:
    """Low-rank adapters on the linear layers of every layer that noisy rows run through."""

    rank: int = Field(default=32, ge=1)
    alpha: float = Field(default=64.0, gt=0)
    targets: tuple[str, ...] = TARGETS


EVERY_ROW = sys.maxsize


@dataclass
class Gate:
    """Shared by the adapters of a model: how many rows of a forward are clean. They lie first.

    Outside `after` every row is clean, so that whoever else calls the weights (`ar.Parent` does) has the parent.
    """

    clean: int = EVERY_ROW

    @contextlib.contextmanager
    def after(self, clean: int) -> Iterator[None]:
        """Within the context rows from number `clean` on are noisy."""
        self.clean = clean
        try:
            yield
        finally:
            self.clean = EVERY_ROW


class AdapterGroup:
    """Adapters of layers that read the same rows: their down projections are one product while nothing is learnt."""

    def __init__(self) -> None:
        self.members: list[GatedLinear] = []
        self._kept = KeptCopies()
        self._rows: Tensor | None = None
        self._inner: dict[GatedLinear, Tensor] = {}

    def inner(
        self, member: "GatedLinear", rows: Float[Tensor, "batch rows inner"], clean: int
    ) -> Float[Tensor, "noisy rank"]:
        """What `member`'s down projection makes of the rows from number `clean` on. Members are asked in order."""
        if self._rows is not rows or member is self.members[0]:
            downs: list[Tensor] = [each.lora_A for each in self.members]
            packed = self._kept("down", lambda: torch.cat(downs).T.contiguous(), *downs)
            # The few rows are cast to the adapters' type, not the adapters to theirs.
            both = rows[:, clean:].flatten(0, 1).to(packed.dtype) @ packed
            parts = both.split([len(down) for down in downs], -1)
            self._rows, self._inner = rows, dict(zip(self.members, parts, strict=True))
        mine = self._inner[member]
        if member is self.members[-1]:
            self._rows, self._inner = None, {}
        return mine


class GatedLinear(nn.Module):
    """A frozen linear layer, and what its adapter adds to noisy rows: scale * B A x.

    `A` starts as Kaiming-uniform, `B` as zero, as LoRA's do, so that an untrained adapter changes nothing.
    """

    def __init__(self, base_layer: nn.Module, gate: Gate, lora: GatedLoraConfig, group: AdapterGroup) -> None:
        super().__init__()
        self.base_layer, self.gate, self.scale, self.group = base_layer, gate, lora.alpha / lora.rank, group
        group.members.append(self)
        weight: Tensor = base_layer.weight  # type: ignore[assignment]
        into, out = int(base_layer.in_features), int(base_layer.out_features)  # type: ignore[arg-type]
        # Adapters learn in fp32 at least, whatever their base is stored in.
        dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
        self.lora_A = nn.Parameter(torch.empty(lora.rank, into, dtype=dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(out, lora.rank, dtype=dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, rows: Float[Tensor, "batch rows inner"]) -> Float[Tensor, "batch rows outer"]:
        out: Tensor = self.base_layer(rows)
        clean = self.gate.clean
        if clean >= rows.shape[1]:
            return out
        if not torch.is_grad_enabled():  # clean rows are not even copied
            noisy = out[:, clean:]
            delta = self.group.inner(self, rows, clean) @ self.lora_B.T
            noisy.add_(delta.view(noisy.shape), alpha=self.scale)
            return out
        noisy = rows[:, clean:]
        down, up = self.lora_A.to(out.dtype), self.lora_B.to(out.dtype)
        inner = noisy.to(out.dtype) @ down.T * self.scale  # scaled where it is small
        adapted = torch.addmm(out[:, clean:].flatten(0, 1), inner.flatten(0, 1), up.T).view_as(out[:, clean:])
        return adapted if clean == 0 else torch.cat([out[:, :clean], adapted], 1)


def add_gated_lora(causal_lm: PreTrainedModel, lora: GatedLoraConfig, enter: int = 0) -> Gate:
    """Freeze `causal_lm` and put adapters into its layers from number `enter` on, in place. Returns their gate.

    Raises `ConfigError` for targets that the layers do not have.
    """
    for parameter in causal_lm.parameters():
        parameter.requires_grad_(False)
    gate, wrapped = Gate(), set[str]()
    for layer in causal_lm.model.layers[enter:]:
        groups = {name: group for names in TOGETHER for group in (AdapterGroup(),) for name in names}
        for parent, name in list(_linears(layer, lora.targets)):
            setattr(parent, name, GatedLinear(getattr(parent, name), gate, lora, groups[name]))
            wrapped.add(name)
    missing = sorted(set(lora.targets) - wrapped)
    if missing:
        raise ConfigError(f"the model has no layer {missing[0]!r}", f"name targets among {', '.join(TARGETS)}")
    return gate


def gated_layers(causal_lm: nn.Module) -> Iterator[tuple[str, GatedLinear]]:
    """Every adapter under the name of the layer that it wraps."""
    return ((name, part) for name, part in causal_lm.named_modules() if isinstance(part, GatedLinear))


def _linears(layer: nn.Module, targets: tuple[str, ...]) -> Iterator[tuple[nn.Module, str]]:
    for parent in layer.modules():
        if not isinstance(parent, GatedLinear):
            yield from ((parent, name) for name, _ in parent.named_children() if name in targets)
