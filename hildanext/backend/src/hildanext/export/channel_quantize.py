"""Matrices in 8 bits with one scale for each output, and the smoothing that makes 8 bits enough for their inputs."""

import numpy as np

from hildanext.export.network_weights import Array


def quantize_channels(matrix: Array) -> tuple[Array, Array]:
    """Signed 8-bit entries [out in] and the scale of each row, fp32: entry * scale is the weight, nearly."""
    scales = np.maximum(np.abs(matrix).max(1), 1e-12) / 127.0
    entries = np.rint(matrix / scales[:, None]).clip(-127, 127).astype(np.int8)
    return entries, scales.astype(np.float32)
