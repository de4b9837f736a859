"""Block sizes, learning rate and noise over a run."""

import pytest

from hildanext.core.errors import ConfigError
from hildanext.corruption.schedules import (
    BlockPhase,
    LearningRate,
    MaskNoise,
    check_padding,
    check_phases,
    phase_at,
    spread,
    total_tokens,
)
from hildanext.corruption.schedules.mask_embedding_noise import open_ratio

LADDER = (*spread("warmup", [1, 4, 32], 90), *spread("stable", [256], 50), *spread("decay", [64, 32], 41))


def test_every_rung_divides_and_resume_finds_the_same_rung():
    check_phases(LADDER, 256)
    seen = [phase_at(LADDER, tokens).block_size for tokens in range(total_tokens(LADDER))]
    assert seen == [1] * 30 + [4] * 30 + [32] * 30 + [256] * 50 + [64] * 20 + [32] * 21
    assert phase_at(LADDER, 10**9).block_size == 32


def test_a_block_size_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="block size 48 does not divide the sequence length 256"):
        check_phases((BlockPhase(phase="warmup", block_size=48, tokens=5),), 256)


def test_a_document_may_end_inside_a_block_that_is_larger_than_its_padding_and_nowhere_else():
    check_padding(LADDER, 32, 32)
    check_padding(LADDER, 8, 32)
    check_padding(spread("decay", [1], 9), 1, None)


@pytest.mark.parametrize(
    ("sizes", "block_size", "pad", "words"),
    [
        ([8], 8, 12, "pad_to_block 12 is not a multiple of the block size 8"),
        ([8], 32, 8, "pad_to_block 8 is not a multiple of the block size 32"),
        ([1], 4, None, "pad_to_block None is not a multiple of the block size 4"),
        ([1, 16], 6, 24, "pad_to_block 24 and the block size 16 of wsd: neither is a multiple of the other"),
    ],
)
def test_padding_that_leaves_a_document_inside_a_block_is_refused(
    sizes: list[int], block_size: int, pad: int | None, words: str
):
    with pytest.raises(ConfigError, match=words):
        check_padding(spread("decay", sizes, 90), block_size, pad)


def test_phases_out_of_order_are_refused():
    phases = (BlockPhase(phase="decay", block_size=4, tokens=5), BlockPhase(phase="warmup", block_size=4, tokens=5))
    with pytest.raises(ConfigError, match="out of order"):
        check_phases(phases, 8)


def test_no_rungs_are_refused():
    with pytest.raises(ConfigError, match="no phases"):
        check_phases((), 8)


def test_learning_rate_warms_up_stays_and_decays():
    rate = LearningRate(peak=1.0, warmup=0.1, decay=0.2, floor=0.1)
    assert rate.at(0.0) == pytest.approx(0.01)
    assert rate.at(0.05) == pytest.approx(0.5)
    assert rate.at(0.1) == rate.at(0.5) == rate.at(0.8) == 1.0
    assert rate.at(0.9) == pytest.approx(0.1 + 0.9 * 0.5)
    assert rate.at(1.0) == pytest.approx(0.1)


def test_learning_rate_never_rises_after_warm_up():
    rate = LearningRate(peak=3e-4)
    values = [rate.at(i / 500) for i in range(501)]
    top = values.index(max(values))
    assert values[top:] == sorted(values[top:], reverse=True)


def test_mask_noise_falls_linearly_to_zero():
    noise = MaskNoise(deviation=0.4, until=0.5)
    assert [noise.at(p) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.4, 0.2, 0.0, 0.0])


def test_attention_opens_with_the_steps_and_stays_open():
    assert open_ratio(0) == pytest.approx(1e-4)
    assert open_ratio(4_999) == pytest.approx(0.5)
    assert open_ratio(9_999) == open_ratio(50_000) == 1.0
