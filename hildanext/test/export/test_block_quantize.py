"""Matrices in 8 and 4 bits: what a scale covers, and what stays as it was."""

import numpy as np
import pytest

from hildanext.export.block_quantize import Blocks, quantize_blocks
from hildanext.export.channel_quantize import quantize_channels


def back(blocks: Blocks, bits: int, inner: int) -> np.ndarray:
    codes = blocks.packed
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], -1)
    values = (codes.astype(np.float32) - (1 << (bits - 1))) * blocks.scales[..., None]
    values += 0 if blocks.middles is None else blocks.middles[..., None]
    return values.reshape(len(values), -1)[:, :inner]


def test_a_channel_has_its_own_scale_and_is_off_by_half_a_step_at_most() -> None:
    matrix = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32) * np.array([[1e-3], [1], [10], [1], [1]])
    entries, scales = quantize_channels(matrix)
    assert entries.dtype == np.int8 and np.abs(entries).max() == 127
    assert (np.abs(entries * scales[:, None] - matrix) <= scales[:, None] * 0.5001).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_block_has_its_own_scale_and_a_short_one_is_filled_up(bits: int) -> None:
    matrix = np.random.default_rng(1).normal(size=(3, 80)).astype(np.float32)
    blocks = quantize_blocks(matrix, bits, 32)
    assert blocks.packed.shape == (3, 3, 32 * bits // 8) and blocks.scales.shape == (3, 3)
    steps = np.repeat(np.abs(blocks.scales), 32, 1)[:, :80]
    most = 0.5001 if bits == 8 else 1.0001  # on Q4_0's grid the entry opposite to the largest may be a step off
    assert (np.abs(back(blocks, bits, 80) - matrix) <= steps * most).all()


def test_what_lay_on_a_grid_of_four_bits_with_a_smallest_value_stays_as_it_was() -> None:
    random = np.random.default_rng(2)
    codes = random.integers(0, 16, (4, 2, 32))
    codes[..., 0], codes[..., 1] = 0, 15  # Q4_1 takes a block's ends for the ends of its grid
    steps, lowest = random.uniform(0.01, 0.1, (4, 2, 1)), random.normal(size=(4, 2, 1))
    matrix = (codes * steps + lowest).reshape(4, 64).astype(np.float32)
    np.testing.assert_allclose(back(quantize_blocks(matrix, 4, 32), 4, 64), matrix, atol=2e-6)


def test_what_lay_on_a_grid_about_zero_stays_as_it_was_wherever_its_smallest_value_is() -> None:
    random = np.random.default_rng(4)
    codes = random.integers(-5, 6, (4, 2, 32))
    codes[..., 7] = -8  # Q4_0: the entry of the largest magnitude is 8 steps from 0
    steps = random.uniform(0.01, 0.1, (4, 2, 1)) * random.choice([-1, 1], (4, 2, 1))
    matrix = (codes * steps).reshape(4, 64).astype(np.float32)
    blocks = quantize_blocks(matrix, 4, 32)
    np.testing.assert_allclose(back(blocks, 4, 64), matrix, atol=1e-7)
    assert blocks.middles is not None and not blocks.middles.any()


def test_zeros_stay_zeros() -> None:
    nothing = np.zeros((2, 32), np.float32)
    assert not (quantize_channels(nothing)[0]).any() and not back(quantize_blocks(nothing, 4, 32), 4, 32).any()
