"""Advantages, from the rewards of a group. To add one: write the file, add its row, add its case."""

from hildanext.rl.advantages.amplified import Amplified
from hildanext.rl.advantages.base import Advantage
from hildanext.rl.advantages.leave_one_out import LeaveOneOut
from hildanext.rl.advantages.mean import Mean
from hildanext.rl.advantages.standardised import Standardised
from hildanext.rl.advantages.weighted import Weighted

ADVANTAGES: dict[str, type[Advantage]] = {
    "leave_one_out": LeaveOneOut,
    "mean": Mean,
    "standardised": Standardised,
    "weighted": Weighted,
    "amplified": Amplified,
}

__all__ = ["ADVANTAGES", "Advantage"]
