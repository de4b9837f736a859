"""The rewards: each judges answers to a prompt with a number from 0 to its class's `highest`."""

from hildanext.grading.base import Reward
from hildanext.grading.code import CodeReward
from hildanext.grading.gsm8k import Gsm8kReward

REWARDS: dict[str, type[Reward]] = {
    "gsm8k": Gsm8kReward,
    "code": CodeReward,
}

__all__ = ["REWARDS", "Reward"]
