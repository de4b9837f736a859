"""Matrices in 4 or 8 bits with one scale for every few inputs of an output, as ONNX Runtime's `MatMulNBits` reads them.

GGUF's formats fit: Q8_0 are 8 bits without middles, Q4_0 and Q4_1 are 4 bits with them, exactly. `MatMulNBits` has no
middles that are no whole numbers of steps; the graph adds them by a product of their own (`onnx_graph`).
"""

from typing import NamedTuple

import numpy as np

from hildanext.export.network_weights import Array


class Blocks(NamedTuple):
    """(entry - 2^(bits-1)) * scale + middle is the weight, nearly."""

    packed: Array
    """uint8 [out blocks block*bits/8]."""
    scales: Array
    """fp32 [out blocks]."""
    middles: Array | None = None
    """fp32 [out blocks]; None where all are 0."""


def quantize_blocks(matrix: Array, bits: int, block: int) -> Blocks:
    """In 8 bits about 0, as Q8_0 has it; in 4 bits on Q4_1's grid, from the smallest to the largest entry of a block,
    or on Q4_0's, whose largest entry is 8 steps from 0, whichever is nearer: so what was on such a grid before stays as
    it is. A last block that is not full is filled with zeros."""
    out, inner = matrix.shape
    blocks = -(-inner // block)
    padded = np.zeros((out, blocks * block), np.float32)
    padded[:, :inner] = matrix
    padded = padded.reshape(out, blocks, block)
    if bits == 8:
        scales = np.maximum(np.abs(padded).max(-1), 1e-12) / 127
        return Blocks((np.rint(padded / scales[..., None]) + 128).astype(np.uint8), scales.astype(np.float32))
    low, high = padded.min(-1), padded.max(-1)
    scales = np.maximum(high - low, 1e-12) / 15
    codes = np.rint((padded - low[..., None]) / scales[..., None]).clip(0, 15)
    middles = low + 8 * scales
    peaks = np.take_along_axis(padded, np.abs(padded).argmax(-1)[..., None], -1)[..., 0]
    steps = np.where(peaks == 0, 1e-12, peaks) / -8
    around = np.rint(padded / steps[..., None]).clip(-8, 7) + 8
    nearer = _error(around, steps, 0 * steps, padded) < _error(codes, scales, middles, padded)
    codes = np.where(nearer[..., None], around, codes).astype(np.uint8)
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)  # two in a byte, the first in the lower half
    scales, middles = np.where(nearer, steps, scales), np.where(nearer, 0, middles)
    return Blocks(packed, scales.astype(np.float32), middles.astype(np.float32))


def _error(codes: Array, scales: Array, middles: Array, wanted: Array) -> Array:
    """Squared, of each block."""
    error: Array = np.square((codes - 8) * scales[..., None] + middles[..., None] - wanted).sum(-1)
    return error
