"""The rewards: each judges answers to a prompt with a number from 0 to its `highest`."""

from hildanext.grading.base import Reward, checked_scores
from hildanext.grading.code import CodeReward
from hildanext.grading.countdown import CountdownReward
from hildanext.grading.format import FormatReward
from hildanext.grading.gsm8k import Gsm8kReward
from hildanext.grading.math import MathReward
from hildanext.grading.sudoku import SudokuReward
from hildanext.grading.weighted import WeightedReward

REWARDS: dict[str, type[Reward]] = {
    "gsm8k": Gsm8kReward,
    "math": MathReward,
    "countdown": CountdownReward,
    "sudoku": SudokuReward,
    "code": CodeReward,
    "format": FormatReward,
    "weighted": WeightedReward,
}

__all__ = ["REWARDS", "Reward", "checked_scores"]
