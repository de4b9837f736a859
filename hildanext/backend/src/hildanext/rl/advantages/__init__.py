"""Advantages, from the rewards of a group. To add one: write the file, add its row, add its case."""

from hildanext.rl.advantages.base import Advantage
from hildanext.rl.advantages.leave_one_out import LeaveOneOut

ADVANTAGES: dict[str, type[Advantage]] = {
    "leave_one_out": LeaveOneOut,
}

__all__ = ["ADVANTAGES", "Advantage"]
