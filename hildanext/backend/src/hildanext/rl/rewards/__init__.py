"""Verifiable rewards. To add one: write the file, add its row, add its case."""

from hildanext.rl.rewards.base import Reward
from hildanext.rl.rewards.code import CodeReward
from hildanext.rl.rewards.gsm8k import Gsm8kReward

REWARDS: dict[str, type[Reward]] = {
    "gsm8k": Gsm8kReward,
    "code": CodeReward,
}

__all__ = ["REWARDS", "Reward"]
