"""Linear layers in bf16 on a CPU, their matrices laid out once as oneDNN's kernels read them.

Otherwise every call with more than one row lays them out anew. Layers that read the same rows are one product, their
adapters' down projections with them. Each row's bits are its own, however many are fed with it.
"""

from collections.abc import Iterator, Sequence
from functools import cache, cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from hildanext.core.errors import ModelError
from hildanext.models.gated_lora import TOGETHER, Gate, GatedLinear

FEW = 4
"""Rows are at least so many: one alone would meet another kernel, which adds in another order where rows are long, and
two or three take longer than four (a matrix of 3072 x 576, two threads of an EPYC: 0.26 ms and 0.19)."""


@cache
def _supported() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    operators = torch.ops.mkldnn
    return hasattr(operators, "_reorder_linear_weight") and bool(operators._is_mkldnn_bf16_supported())


def packs(matrix: Tensor) -> bool:
    """Whether this processor and this torch have the layout for matrices of this type and device."""
    return matrix.dtype == torch.bfloat16 and matrix.device.type == "cpu" and _supported()


def pack(matrix: Float[Tensor, "outer inner"]) -> Tensor:
    """A copy in the layout of oneDNN; `to_dense()` gives the matrix back."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix.detach().contiguous(), FEW)
    return packed


def product(rows: Float[Tensor, "*rows inner"], packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows @ matrix.T + bias, of a packed matrix. No gradient flows through it."""
    count = rows.numel() // rows.shape[-1]
    if count >= FEW:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
        return out
    fed = pad(rows.reshape(count, -1), (0, 0, 0, FEW - count))
    out = torch.ops.mkldnn._linear_pointwise(fed, packed, bias, "none", [], "")
    return out[:count].view(*rows.shape[:-1], -1)


class PackedGroup:
    """Layers that read the same rows, in the order in which they are asked."""

    def __init__(self, layers: Sequence[nn.Linear | GatedLinear]) -> None:
        plain = [layer.base_layer if isinstance(layer, GatedLinear) else layer for layer in layers]
        gated = [layer for layer in layers if isinstance(layer, GatedLinear)]
        matrices: list[Tensor] = [layer.weight for layer in plain]  # type: ignore[misc]
        dtype = matrices[0].dtype
        self.sizes = [len(matrix) for matrix in matrices]
        self.outer = sum(self.sizes)
        self.gate: Gate | None = gated[0].gate if gated else None
        self.packed = pack(torch.cat([*matrices, *(layer.lora_A.to(dtype) for layer in gated)]))
        self.bias = _bias(plain, self.packed.shape[0])
        if gated:
            self.up = pack(_ups(layers).to(dtype))
        self.inner = matrices[0].shape[1]
        self._rows: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()

    @cached_property
    def rows_alone(self) -> bool:
        """Whether rows came out with the same bits in every company that was tried on this device."""
        rows = torch.randn(32, self.inner, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        together = product(rows, self.packed)
        return all(
            torch.equal(torch.cat([product(part, self.packed) for part in rows.split(size)]), together)
            for size in (1, FEW, 9, 25)
        )

    def matrix(self, number: int) -> Float[Tensor, "outer inner"]:
        """Of one of the layers, unpacked."""
        begin = sum(self.sizes[:number])
        return self.packed.to_dense()[begin : begin + self.sizes[number]]

    def ask(self, number: int, rows: Float[Tensor, "*rows inner"]) -> Float[Tensor, "*rows outer"]:
        """What one of the layers makes of the rows, which the first one is asked about first."""
        if number == 0 or rows is not self._rows:
            self._rows, self._parts = rows, self._computed(rows).split(self.sizes, -1)
        part = self._parts[number]
        if number == len(self.sizes) - 1:
            self._rows, self._parts = None, ()
        return part

    def _computed(self, rows: Tensor) -> Float[Tensor, "*rows all"]:
        out = product(rows, self.packed, self.bias)
        gate = self.gate
        if gate is None:
            return out
        both = out[..., : self.outer]
        if gate.clean < rows.shape[1]:
            noisy = out[:, gate.clean :]
            noisy[..., : self.outer].add_(product(noisy[..., self.outer :].contiguous(), self.up))
        return both


def _bias(layers: Sequence[nn.Module], rows: int) -> Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    parts = [
        torch.zeros(int(layer.out_features)) if layer.bias is None else layer.bias.detach().float()  # type: ignore
        for layer in layers
    ]
    bias = torch.zeros(rows)
    bias[: sum(map(len, parts))] = torch.cat(parts)
    return bias.to(layers[0].weight.dtype)  # type: ignore[arg-type]


def _ups(layers: Sequence[nn.Linear | GatedLinear]) -> Float[Tensor, "outer ranks"]:
    """Up projections on the diagonal of one matrix; a layer without an adapter has rows of zeros."""
    parts = []
    for layer in layers:
        if isinstance(layer, GatedLinear):
            parts.append(layer.scale * layer.lora_B.detach())
        else:
            parts.append(layer.weight.new_zeros(layer.out_features, 0, dtype=torch.float32))
    return torch.block_diag(*parts)


class PackedLinear(nn.Module):
    """One layer of a group. It only computes: it has no parameter that could learn.

    `weight` unpacks. A matrix that is an embedding, too, stays as it is beside the packed copy.
    """

    def __init__(self, group: PackedGroup, number: int, matrix: Tensor | None = None) -> None:
        super().__init__()
        self.group, self.number, self._matrix = group, number, matrix
        self.in_features, self.out_features = group.inner, group.sizes[number]

    @property
    def weight(self) -> Float[Tensor, "outer inner"]:
        return self.group.matrix(self.number) if self._matrix is None else self._matrix

    def forward(self, rows: Float[Tensor, "*rows inner"]) -> Float[Tensor, "*rows outer"]:
        """Raises `ModelError` where somebody would learn from what comes out."""
        if torch.is_grad_enabled() and rows.requires_grad:
            raise ModelError("packed layers have no gradients", "load the model for training")
        return self.group.ask(self.number, rows)


def pack_linears(causal_lm: PreTrainedModel) -> None:
    """Pack the layers of a model that is only to compute, in place, where this device has the layout for them; others
    stay as they are."""
    if not packs(causal_lm.get_input_embeddings().weight):
        return
    for parent, names in _groups(causal_lm):
        layers = [getattr(parent, name) for name in names]
        group = PackedGroup(layers)
        for number, name in enumerate(names):
            setattr(parent, name, PackedLinear(group, number))
    head, embedding = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings().weight
    tied = head.weight if head.weight.data_ptr() == embedding.data_ptr() else None
    causal_lm.set_output_embeddings(PackedLinear(PackedGroup([head]), 0, tied))


def rows_alone(causal_lm: PreTrainedModel) -> bool:
    """Whether all linear layers are packed, and no kernel that this device takes for them mixes a row with others."""
    if any(isinstance(layer, nn.Linear | GatedLinear) for layer in causal_lm.modules()):
        return False
    shapes: dict[tuple[int, ...], PackedGroup] = {}  # kernels are chosen by shape
    for layer in causal_lm.modules():
        if isinstance(layer, PackedLinear):
            shapes.setdefault(tuple(layer.group.packed.shape), layer.group)
    return bool(shapes) and all(group.rows_alone for group in shapes.values())


def _groups(causal_lm: PreTrainedModel) -> Iterator[tuple[nn.Module, list[str]]]:
    """Modules of a layer, and which of their linear layers in bf16 read the same rows."""
    for parent in list(causal_lm.model.modules()):
        for together in TOGETHER:
            names = [name for name in together if _packable(getattr(parent, name, None))]
            if names:
                yield parent, names


def _packable(layer: nn.Module | None) -> bool:
    plain = layer.base_layer if isinstance(layer, GatedLinear) else layer
    return type(plain) is nn.Linear and packs(plain.weight)
