"""Losses of the policy. To add one: write the file, add its row, add its case."""

from hildanext.rl.objectives.base import Objective

OBJECTIVES: dict[str, type[Objective]] = {}

__all__ = ["OBJECTIVES", "Objective"]
