"""A network's weights as an export lays them out: query, key and value as one matrix, gate and up as one.

Query heads that share keys lie apart: head g of every group of keys, then head g + 1 of every group. A runtime then
reads them as more rows of each group without moving anything.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from hildanext.core.errors import ModelError
from hildanext.models.drafter import Drafter
from hildanext.models.gated_lora import GatedLinear

Array = np.ndarray[Any, np.dtype[Any]]

LINEAR = ("qkv", "o", "gate_up", "down")
PARTS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
ROPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles depend on the position alone."""


@dataclass
class LayerWeights:
    """Of one layer, fp32. Matrices are [out in]."""

    norms: dict[str, Array]
    """`attention` and `mlp`; `q` and `k` where the heads are normed."""
    linear: dict[str, Array]
    biases: dict[str, Array] = field(default_factory=dict)
    adapters: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    """Down and up projection of what is added to mask rows, the scale within the second."""


@dataclass
class NetworkWeights:
    """Of a parent, or of a parent with draft adapters."""

    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    embedding: Array
    norm: Array
    head: Array
    layers: list[LayerWeights]
    inv_freq: Array
    rope_scale: float
    enter: int = 0
    places: Array | None = None
    """The vector of each place of a group of masks; None where there are no adapters."""
    sampler: dict[str, Array] | None = None
    """Of the sampler head (`models.sampler_head`); None where there is none."""
    draft_tokens: Array | None = None
    """Ids of the tokens that drafts may say; None: all."""

    @property
    def hidden(self) -> int:
        return int(self.embedding.shape[1])

    @property
    def group(self) -> int:
        """Query heads that share a head of keys."""
        return self.heads // self.kv_heads


def weights_of(source: Drafter | PreTrainedModel) -> NetworkWeights:
    """Copies in fp32. Raises `ModelError` for a rotary embedding that depends on more than the position."""
    causal_lm = source.causal_lm if isinstance(source, Drafter) else source
    config, model = causal_lm.config, causal_lm.model
    rope = getattr(model.rotary_emb, "rope_type", "default")
    if rope not in ROPES:
        raise ModelError(f"a rotary embedding of type {rope!r} cannot be exported", f"supported: {', '.join(ROPES)}")
    heads, kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    order = _group_order(heads, kv_heads, head_dim)
    weights = NetworkWeights(
        heads, kv_heads, head_dim, float(config.rms_norm_eps),
        _array(causal_lm.get_input_embeddings().weight), _array(model.norm.weight),
        _array(causal_lm.get_output_embeddings().weight), [_layer(layer, order) for layer in model.layers],
        _array(model.rotary_emb.inv_freq), float(model.rotary_emb.attention_scaling),
    )  # fmt: skip
    if isinstance(source, Drafter) and source.places:
        weights.enter = source.enter
        vectors = _array(source.place_vectors)
        weights.places = np.repeat(vectors, source.places, 0) if len(vectors) == 1 else vectors
        if source.sampler is not None:
            weights.sampler = {name: _array(part) for name, part in source.sampler.named_parameters()}
        if source.draft_tokens is not None:
            weights.draft_tokens = source.draft_tokens.cpu().numpy()
    return weights


def _group_order(heads: int, kv_heads: int, head_dim: int) -> Array:
    """Old channel of each new one of the queries."""
    channels = np.arange(heads * head_dim).reshape(kv_heads, heads // kv_heads, head_dim)
    return channels.transpose(1, 0, 2).reshape(-1)


def _layer(layer: nn.Module, order: Array) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    norms = {"attention": _array(layer.input_layernorm.weight), "mlp": _array(layer.post_attention_layernorm.weight)}  # type: ignore[union-attr, arg-type]
    for name in ("q", "k"):
        if hasattr(attention, f"{name}_norm"):
            norms[name] = _array(getattr(attention, f"{name}_norm").weight)
    weights = LayerWeights(norms, {})
    for name, parts in PARTS.items():
        home = attention if name in ("qkv", "o") else mlp
        modules = [getattr(home, part) for part in parts]
        bases = [module.base_layer if isinstance(module, GatedLinear) else module for module in modules]
        matrices = [_array(base.weight) for base in bases]
        if name == "qkv":
            matrices[0] = matrices[0][order]
        if name == "o":
            matrices[0] = matrices[0][:, order]
        weights.linear[name] = np.concatenate(matrices)
        if any(getattr(base, "bias", None) is not None for base in bases):
            biases = [
                np.zeros(len(m), np.float32) if b.bias is None else _array(b.bias)
                for m, b in zip(matrices, bases, strict=True)
            ]
            if name == "qkv":
                biases[0] = biases[0][order]
            weights.biases[name] = np.concatenate(biases)
        adapted = list(_adapters(modules, [len(matrix) for matrix in matrices]))
        if adapted:
            down, up = np.concatenate([a for a, _ in adapted]), np.concatenate([b for _, b in adapted], 1)
            queries = len(order)
            if name == "qkv":
                up[:queries] = up[:queries][order]
            weights.adapters[name] = (down[:, order] if name == "o" else down, up)
    return weights


def _adapters(modules: Sequence[nn.Module], widths: Sequence[int]) -> Iterator[tuple[Array, Array]]:
    """Each adapter's down projection, and its up projection at its place among all outputs."""
    begin = 0
    for module, width in zip(modules, widths, strict=True):
        if isinstance(module, GatedLinear):
            down, own = _array(module.lora_A), _array(module.lora_B) * np.float32(module.scale)
            up = np.zeros((sum(widths), own.shape[1]), np.float32)
            up[begin : begin + width] = own
            yield down, up
        begin += width


def _array(tensor: Any) -> Array:
    assert isinstance(tensor, torch.Tensor)
    return tensor.detach().to("cpu", torch.float32).numpy().copy()
