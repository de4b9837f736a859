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
    """In 8 bits about 0; in 4 bits from the smallest to the largest entry of a block, so that what was on such a grid
    before stays as it is. A last block that is not full is filled with zeros."""
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
    codes = np.rint((padded - low[..., None]) / scales[..., None]).clip(0, 15).astype(np.uint8)
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)  # two in a byte, the first in the lower half
    return Blocks(packed, scales.astype(np.float32), (low + 8 * scales).astype(np.float32))
