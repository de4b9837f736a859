"""Schedules: block sizes, learning rate, mask-embedding noise."""

from hildanext.schedules.learning_rate import LearningRate
from hildanext.schedules.noise import MaskNoise
from hildanext.schedules.wsd import Rung, check_padding, check_rungs, rung_at, spread, total_tokens

__all__ = ["LearningRate", "MaskNoise", "Rung", "check_padding", "check_rungs", "rung_at", "spread", "total_tokens"]
