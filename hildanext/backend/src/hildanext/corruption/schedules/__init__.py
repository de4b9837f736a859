"""Schedules: block sizes, learning rate, mask-embedding noise."""

from hildanext.corruption.schedules.learning_rate import LearningRate
from hildanext.corruption.schedules.mask_embedding_noise import MaskNoise
from hildanext.corruption.schedules.wsd import BlockPhase, check_padding, check_phases, phase_at, spread, total_tokens

__all__ = [
    "LearningRate",
    "MaskNoise",
    "BlockPhase",
    "check_padding",
    "check_phases",
    "phase_at",
    "spread",
    "total_tokens",
]
