"""Matrices in 4 or 8 bits with one scale for every few inputs of an output, as ONNX Runtime's `MatMulNBits` reads them."""

import numpy as np

from hildanext.export.network_weights import Array


def quantize_blocks(matrix: Array, bits: int, block: int) -> tuple[Array, Array]:
    """Packed entries, uint8 [out blocks block*bits/8], and scales, fp32 [out blocks]; (entry - 2^(bits-1)) * scale."""
    out, inner = matrix.shape
    blocks = -(-inner // block)
    padded = np.zeros((out, blocks * block), np.float32)
    padded[:, :inner] = matrix
    padded = padded.reshape(out, blocks, block)
    middle = 1 << (bits - 1)
    if bits == 8:
        scales = np.abs(padded).max(-1) / 127.0
    else:  # the largest entry gets the code that is one further from the middle, as in GGUF's Q4_0
        largest = np.take_along_axis(padded, np.abs(padded).argmax(-1)[..., None], -1)[..., 0]
        scales = largest / -middle
    safe = np.where(scales == 0, 1, scales)
    codes = (np.rint(padded / safe[..., None]) + middle).clip(0, 2 * middle - 1).astype(np.uint8)
    return pack(codes, bits), scales.astype(np.float32)


def pack(codes: Array, bits: int) -> Array:
    """Codes of 4 bits two in a byte, the first in the lower half; those of 8 bits as they are."""
    return codes if bits == 8 else codes[..., 0::2] | (codes[..., 1::2] << 4)
