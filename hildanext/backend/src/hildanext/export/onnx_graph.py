"""The network as an ONNX graph for ONNX Runtime: rows of one document over its keys and values, written in place.

Rows in, final states out; the head is a graph of its own, so that only rows that are read go through it. Keys and
values of a layer are [slots kv_heads head_dim]; a caller binds the outputs to the memory of the inputs. Who sees which
slot is an additive bias. Its width is the caller's, a multiple of `kv_cache.block_cache.STRETCH`: sums over slots then
add the same numbers in the same order whatever stands behind them, and a row's numbers do not depend on the rows beside
it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hildanext.export.block_quantize import quantize_blocks
from hildanext.export.channel_quantize import quantize_channels
from hildanext.export.network_weights import Array, LayerWeights, NetworkWeights

BLOCK = 32
"""Inputs that share a scale in block-wise quantised matrices."""
CONTRIB = "com.microsoft"
OPSET = 21


@dataclass(frozen=True)
class GraphKind:
    """Which graph is made of the weights."""

    dtype: str
    """fp32, q8 or q4."""
    masks: bool = False
    """With mask rows and adapters behind the clean rows; else clean rows alone."""
    unsigned: bool = False
    """Write 8-bit matrices unsigned: processors without the newer dot products saturate on signed ones."""


class _Builder:
    """Nodes and constants of one graph."""

    def __init__(self, kind: GraphKind) -> None:
        self.kind = kind
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self._quantized: dict[str, tuple[str, str]] = {}
        self._even: dict[str, str] = {}
        self._sums: dict[str, str] = {}

    def node(
        self, op: str, inputs: list[str], outputs: int | list[str] = 1, domain: str = "", **attributes: Any
    ) -> Any:
        """Returns the output's name, or the list of them."""
        number = len(self.nodes)
        names = [f"n{number}_{i}" for i in range(outputs)] if isinstance(outputs, int) else outputs
        self.nodes.append(helper.make_node(op, inputs, names, name=f"{op}_{number}", domain=domain, **attributes))
        return names[0] if len(names) == 1 else names

    def once(self, name: str, op: str, inputs: list[str], **attributes: Any) -> str:
        """A node whose output is asked for by name, made the first time."""
        if not any(name in node.output for node in self.nodes):
            self.node(op, inputs, [name], **attributes)
        return name

    def constant(self, name: str, value: Array) -> str:
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def shape(self, *sizes: int) -> str:
        return self.constant("shape_" + "_".join(map(str, sizes)), np.array(sizes, np.int64))

    def linear(
        self,
        rows: str,
        matrix: Array,
        name: str,
        bias: Array | None = None,
        more: str | None = None,
        bits: int | None = None,
        fine: bool = False,
    ) -> str:
        """rows @ matrix.T (+ bias), in the type of the graph or in blocks of so many `bits`; `more` as `adapter` gives.
        With `fine`, rows that are put in 8 bits keep 16."""
        if self.kind.dtype == "fp32":
            out = self.node("MatMul", [rows, self.constant(name, matrix.T)])
        elif self.kind.dtype == "q8" and bits is None:
            small, largest = self._rows_in_8_bits(rows)
            out = self._columns_in_16_bits(rows, matrix, name) if fine else self._columns_in_8_bits(small, matrix, name)
            out = self.node("Mul", [out if more is None else self.node("Add", [out, more]), largest])
        else:
            bits = bits or 4
            blocks = quantize_blocks(matrix, bits, BLOCK)
            inputs = [rows, self.constant(name, blocks.packed), self.constant(f"{name}.scales", blocks.scales)]
            sizes = {"K": matrix.shape[1], "N": matrix.shape[0], "bits": bits, "block_size": BLOCK, "accuracy_level": 4}
            out = self.node("MatMulNBits", inputs, domain=CONTRIB, **sizes)
            if blocks.middles is not None:
                out = self.node("Add", [out, self._middles(rows, blocks.middles, matrix.shape[1], f"{name}.middles")])
        return self.node("Add", [out, self.constant(f"{name}.bias", bias)]) if bias is not None else out

    def adapter(self, rows: str, down: Array, up: Array, name: str) -> str:
        """What an adapter adds to rows in 8 bits, in units of each row's largest entry."""
        small, _ = self._rows_in_8_bits(rows)
        lengths = np.maximum(np.linalg.norm(down, axis=1), 1e-12)[:, None]  # entries of the inner rows below about 1
        inner = self.node("Mul", [self._columns_in_8_bits(small, down / lengths, f"{name}.a"), "gate"])
        inner = self.node("QuantizeLinear", [inner, self._step(), self._middle()])
        return self._columns_in_8_bits(inner, up * lengths[:, 0], f"{name}.b")

    def _columns_in_8_bits(self, small: str, matrix: Array, name: str) -> str:
        """8-bit rows times 8-bit columns with one scale each, added up exactly."""
        quantized, scales = quantize_channels(matrix)
        columns, zero = quantized.T, []
        if self.kind.unsigned:
            columns, zero = (columns.astype(np.int16) + 128).astype(np.uint8), [self._middle()]
        scale = self.constant(f"{name}.scales", scales)
        inputs = [small, self.constant(name, columns), self._step(), scale, self._middle(), *zero]
        return str(self.node("MatMulIntegerToFloat", inputs, domain=CONTRIB))

    def _columns_in_16_bits(self, rows: str, matrix: Array, name: str) -> str:
        """The same, and what rounding to 8 bits left of the rows as as many rows more."""
        small, even = self._quantized[rows][0], self._even[rows]
        known = self.node("DequantizeLinear", [small, self._step(), self._middle()])
        finer = self.constant("finer", np.asarray(1 / (127 * 254), np.float32))
        rest = self.node("QuantizeLinear", [self.node("Sub", [even, known]), finer, self._middle()])
        both = self._columns_in_8_bits(self.node("Concat", [small, rest], axis=-2), matrix, name)
        coarse, fine = self.node("Split", [both], 2, axis=-2, num_outputs=2)
        return str(
            self.node(
                "Add", [coarse, self.node("Mul", [fine, self.constant("share", np.asarray(1 / 254, np.float32))])]
            )
        )

    def _middles(self, rows: str, middles: Array, inner: int, name: str) -> str:
        """What the middles of blocks add: a block's inputs add up, times its middle."""
        blocks = middles.shape[1]
        short = blocks * BLOCK - inner
        if short:
            pads = self.constant(f"pads_{short}", np.array([0, 0, 0, 0, 0, short], np.int64))
            rows = self.node("Pad", [rows, pads])
        if rows not in self._sums:
            parts = self.node("Reshape", [rows, self.shape(1, -1, blocks, BLOCK)])
            axis = self.constant("last", np.array([-1], np.int64))
            self._sums[rows] = self.node("ReduceSum", [parts, axis], keepdims=0)
        return str(self.node("MatMul", [self._sums[rows], self.constant(name, middles.T)]))

    def _step(self) -> str:
        return self.constant("step", np.asarray(1 / 127, np.float32))

    def _middle(self) -> str:
        return self.constant("middle", np.asarray(128, np.uint8))

    def _rows_in_8_bits(self, rows: str) -> tuple[str, str]:
        """Rows over their largest entry, in 8 bits; and that entry."""
        if rows not in self._quantized:
            magnitude = self.node("Abs", [rows])
            axis = self.constant("last", np.array([-1], np.int64))
            largest = self.node("ReduceMax", [magnitude, axis], keepdims=1)
            largest = self.node("Max", [largest, self.constant("tiny", np.asarray(1e-12, np.float32))])
            even = self.node("Div", [rows, largest])
            small = self.node("QuantizeLinear", [even, self._step(), self._middle()])
            self._quantized[rows], self._even[rows] = (small, largest), even
        return self._quantized[rows]


def network_graph(weights: NetworkWeights, kind: GraphKind) -> onnx.ModelProto:
    """Inputs `tokens` [rows], `cos` and `sin` [rows head_dim/2], `order` [1 rows] (0, 1, ...), `slots` [rows 1], `bias`
    [rows*group slots], `keys.i`, `values.i` [slots kv_heads head_dim]; output `hidden` [1 rows hidden] and the keys and
    values again. With masks `anchors`, `places` [masks] and `gate` [1 rows 1] (1 for mask rows), too, and of what
    depends on rows the clean rows' part once more, prefixed `clean_`, where masks enter behind the first layers."""
    b = _Builder(kind)
    rows = _embed(b, weights)
    skip: str | None = None
    early = kind.masks and weights.enter > 0
    if kind.masks and weights.enter == 0:
        rows = _enter(b, weights, rows)
    for number, layer in enumerate(weights.layers):
        if early and number == weights.enter:
            rows, skip = _enter_between(b, weights, rows, skip)
        clean = early and number < weights.enter
        normed, rows = _norm(b, rows, skip, layer.norms["attention"], f"{number}.norm1", weights.epsilon)
        adapted = kind.masks and not clean
        skip = _attention(b, weights, layer, number, normed, "clean_" if clean else "", adapted)
        normed, rows = _norm(b, rows, skip, layer.norms["mlp"], f"{number}.norm2", weights.epsilon)
        skip = _mlp(b, layer, number, normed, adapted)
    _norm(b, rows, skip, weights.norm, "norm", weights.epsilon, "hidden")
    return _model(b, *_ports(weights, kind, early))


def head_graph(weights: NetworkWeights, kind: GraphKind) -> onnx.ModelProto:
    """`hidden` [rows hidden] to `logits` [rows vocab]."""
    b = _Builder(kind)
    b.linear("hidden", weights.head, "head", bits=8 if kind.dtype == "q4" else None, fine=True)
    b.nodes[-1].output[0] = "logits"
    inputs = [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["rows", weights.hidden])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", len(weights.head)])]
    return _model(b, inputs, outputs)


def draft_head_graph(weights: NetworkWeights, kind: GraphKind) -> onnx.ModelProto:
    """`hidden` [rows hidden] of mask rows to `scores` and `ids` [rows count], likeliest first, of those tokens that
    drafts may say; `count` [1] is how many, at most."""
    b = _Builder(kind)
    chosen = weights.draft_tokens
    head, name = (weights.head, "head") if chosen is None else (weights.head[chosen], "draft_head")
    logits = b.linear("hidden", head, name, bits=8 if kind.dtype == "q4" else None, fine=True)
    _, best = b.node("TopK", [logits, "count"], 2, axis=-1)
    if chosen is None:
        b.node("Identity", [best], ["ids"])
    else:
        b.node("Gather", [b.constant("draft_tokens", chosen.astype(np.int64)), best], ["ids"])
    info = helper.make_tensor_value_info
    inputs = [info("hidden", TensorProto.FLOAT, ["rows", weights.hidden]), info("count", TensorProto.INT64, [1])]
    return _model(b, inputs, [info("ids", TensorProto.INT64, ["rows", "chosen"])])


def sampler_graph(weights: NetworkWeights, kind: GraphKind) -> onnx.ModelProto:
    """`hidden` [rows hidden] and `before` [rows], the tokens before, to `told` [rows hidden]: `models.sampler_head`."""
    assert weights.sampler is not None
    b, parts = _Builder(kind), weights.sampler
    known = b.node("Reshape", [_embed(b, weights, "before"), b.shape(-1, weights.hidden)])
    scale = b.constant("sampler.scale", parts["scale"])
    known = b.node("SimplifiedLayerNormalization", [known, scale], axis=-1, epsilon=1e-6)
    inner = b.node("Concat", ["hidden", known], axis=-1)
    inner = b.linear(inner, parts["down"], "sampler.down", bits=8 if kind.dtype == "q4" else None)
    inner = b.node("QuickGelu", [inner], domain=CONTRIB, alpha=1.0)
    shift = b.linear(inner, parts["up"], "sampler.up", bits=8 if kind.dtype == "q4" else None)
    b.node("Add", ["hidden", shift], ["told"])
    info = helper.make_tensor_value_info
    inputs = [info("hidden", TensorProto.FLOAT, ["rows", weights.hidden]), info("before", TensorProto.INT64, ["rows"])]
    return _model(b, inputs, [info("told", TensorProto.FLOAT, ["rows", weights.hidden])])


def _embed(b: _Builder, weights: NetworkWeights, tokens: str = "tokens") -> str:
    """[1 rows hidden]; quantised graphs keep the table in 8 bits, a scale for each token."""
    if b.kind.dtype == "fp32":
        rows = b.node("Gather", [b.constant("embedding", weights.embedding), tokens])
    else:
        quantized, scales = quantize_channels(weights.embedding)
        small = b.node("Gather", [b.constant("embedding", quantized), tokens])
        scale = b.node("Gather", [b.constant("embedding.scales", scales[:, None]), tokens])
        rows = b.node("Mul", [b.node("Cast", [small], to=TensorProto.FLOAT), scale])
    return str(b.node("Reshape", [rows, b.shape(1, -1, weights.hidden)]))


def _enter(b: _Builder, weights: NetworkWeights, clean: str) -> str:
    """The clean rows, and behind them the masks: what their anchors are here, plus the vector of their place."""
    assert weights.places is not None
    anchors = b.node("Gather", [clean, "anchors"], axis=1)
    vectors = b.node("Gather", [b.constant("places_table", weights.places), "places"])
    masks = b.node("Add", [anchors, vectors])
    return str(b.node("Concat", [clean, masks], axis=1))


def _enter_between(b: _Builder, weights: NetworkWeights, rows: str, skip: str | None) -> tuple[str, str]:
    """The same behind a layer, whose product stays apart: clean rows meet the kernel that they meet alone."""
    assert skip is not None
    count = b.constant("one", np.array([1], np.int64))
    whole = _enter(b, weights, b.node("Add", [rows, skip]))
    clean = b.node("Shape", ["tokens"])
    end = b.constant("end", np.array([np.iinfo(np.int64).max], np.int64))
    masks = b.node("Slice", [whole, clean, end, count])
    nothing = b.node("Mul", [masks, b.constant("zero", np.asarray(0, np.float32))])
    return b.node("Concat", [rows, masks], axis=1), b.node("Concat", [skip, nothing], axis=1)


def _norm(
    b: _Builder, rows: str, skip: str | None, gamma: Array, name: str, epsilon: float, out: str | None = None
) -> tuple[str, str]:
    """Normed rows, and the rows themselves with `skip` added."""
    scale = b.constant(name, gamma)
    if skip is None:
        return b.node("SimplifiedLayerNormalization", [rows, scale], axis=-1, epsilon=epsilon), rows
    names = [out or f"{name}.out", "", "", f"{name}.sum"]
    b.node("SkipSimplifiedLayerNormalization", [rows, skip, scale], names, CONTRIB, epsilon=epsilon)
    return names[0], names[3]


def _adapted(b: _Builder, layer: LayerWeights, name: str, number: int, rows: str, adapted: bool) -> str:
    """A linear layer; what its adapter adds is zero for clean rows, exactly."""
    label, matrix, bias = f"{number}.{name}", layer.linear[name], layer.biases.get(name)
    if not adapted or name not in layer.adapters:
        return b.linear(rows, matrix, label, bias, fine=name == "down")
    down, up = layer.adapters[name]
    if b.kind.dtype == "q8":
        return b.linear(rows, matrix, label, bias, b.adapter(rows, down, up, label), fine=name == "down")
    bits = None if b.kind.dtype == "fp32" else 8
    inner = b.node("Mul", [b.linear(rows, down, f"{label}.a", bits=bits), "gate"])
    return str(b.node("Add", [b.linear(rows, matrix, label, bias), b.linear(inner, up, f"{label}.b", bits=bits)]))


def _attention(
    b: _Builder, weights: NetworkWeights, layer: LayerWeights, number: int, rows: str, which: str, adapted: bool
) -> str:
    kv, dim, heads = weights.kv_heads, weights.head_dim, weights.heads
    qkv = _adapted(b, layer, "qkv", number, rows, adapted)
    sizes = b.constant("qk_v", np.array([(heads + kv) * dim, kv * dim], np.int64))
    qk, value = b.node("Split", [qkv, sizes], 2, axis=-1)
    sizes = b.constant("q_k", np.array([heads * dim, kv * dim], np.int64))
    if "q" in layer.norms:
        parts = []
        for part, name, count in zip(b.node("Split", [qk, sizes], 2, axis=-1), ("q", "k"), (heads, kv), strict=True):
            each = b.node("Reshape", [part, b.shape(1, -1, count, dim)])
            gamma = b.constant(f"{number}.{name}_norm", layer.norms[name])
            each = b.node("SimplifiedLayerNormalization", [each, gamma], axis=-1, epsilon=weights.epsilon)
            parts.append(b.node("Reshape", [each, b.shape(1, -1, count * dim)]))
        qk = b.node("Concat", parts, axis=-1)
    angles = [f"{which}order", f"{which}cos", f"{which}sin"]
    qk = b.node("RotaryEmbedding", [qk, *angles], domain=CONTRIB, num_heads=heads + kv, rotary_embedding_dim=0)
    query, key = b.node("Split", [qk, sizes], 2, axis=-1)
    by_kv = b.shape(-1, kv, dim)
    query, key, value = (b.node("Reshape", [part, by_kv]) for part in (query, key, value))
    keys = b.node("ScatterND", [f"keys.{number}", f"{which}slots", key], [f"keys_out.{number}"])
    values = b.node("ScatterND", [f"values.{number}", f"{which}slots", value], [f"values_out.{number}"])
    bias = f"{which}bias"
    if weights.group == 1:  # one row alone would meet another kernel, which adds in another order: feed it twice
        query = b.node("Concat", [query, query], axis=0)
        bias = b.once(f"{bias}.twice", "Concat", [bias, bias], axis=0)
    how = {"transBatchA": 1, "transBatchB": 1, "transB": 1, "alpha": dim**-0.5}
    scores = b.node("FusedMatMul", [query, keys], domain=CONTRIB, **how)
    shares = b.node("Softmax", [b.node("Add", [scores, bias])], axis=-1)
    mixed = b.node("FusedMatMul", [shares, values], domain=CONTRIB, transBatchB=1)
    if weights.group == 1:
        mixed = b.node("Split", [mixed], 2, axis=1, num_outputs=2)[0]
    mixed = b.node("Reshape", [b.node("Transpose", [mixed], perm=[1, 0, 2]), b.shape(1, -1, heads * dim)])
    return _adapted(b, layer, "o", number, mixed, adapted)


def _mlp(b: _Builder, layer: LayerWeights, number: int, rows: str, adapted: bool) -> str:
    both = _adapted(b, layer, "gate_up", number, rows, adapted)
    gate, up = b.node("Split", [both], 2, axis=-1, num_outputs=2)
    active = b.node("Mul", [b.node("QuickGelu", [gate], domain=CONTRIB, alpha=1.0), up])
    return _adapted(b, layer, "down", number, active, adapted)


def _ports(weights: NetworkWeights, kind: GraphKind, early: bool) -> tuple[list[Any], list[Any]]:
    info, single, whole = helper.make_tensor_value_info, TensorProto.FLOAT, TensorProto.INT64
    half, group = weights.head_dim // 2, weights.group
    inputs = [info("tokens", whole, ["clean"])]
    for which, rows in [("", "rows"), ("clean_", "clean")][: 2 if early else 1]:
        inputs += [
            info(f"{which}order", whole, [1, rows]), info(f"{which}cos", single, [rows, half]),
            info(f"{which}sin", single, [rows, half]), info(f"{which}slots", whole, [rows, 1]),
            info(f"{which}bias", single, [f"{rows}*{group}", "seen"]),
        ]  # fmt: skip
    if kind.masks:
        inputs += [
            info("anchors", whole, ["masks"]),
            info("places", whole, ["masks"]),
            info("gate", single, [1, "rows", 1]),
        ]
    outputs = [info("hidden", single, [1, "rows", weights.hidden])]
    for number in range(len(weights.layers)):
        for part in ("keys", "values"):
            shape: list[str | int | None] = ["seen", weights.kv_heads, weights.head_dim]
            inputs.append(info(f"{part}.{number}", single, shape))
            outputs.append(info(f"{part}_out.{number}", single, shape))
    return inputs, outputs


def _model(b: _Builder, inputs: list[Any], outputs: list[Any]) -> onnx.ModelProto:
    graph = helper.make_graph(b.nodes, "hildanext", inputs, outputs, list(b.constants.values()))
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10, producer_name="hildanext")
