"""Losses of the policy. To add one: write the file, add its row, add its case."""

from hildanext.rl.objectives.agrpo import Agrpo
from hildanext.rl.objectives.base import Objective
from hildanext.rl.objectives.diffu_grpo import DiffuGrpo
from hildanext.rl.objectives.espo import Espo
from hildanext.rl.objectives.just_grpo import JustGrpo
from hildanext.rl.objectives.raft import Raft
from hildanext.rl.objectives.spg import Spg
from hildanext.rl.objectives.wd1 import Wd1
from hildanext.rl.objectives.wd1pp import Wd1pp

OBJECTIVES: dict[str, type[Objective]] = {
    "espo": Espo,
    "agrpo": Agrpo,
    "wd1": Wd1,
    "wd1pp": Wd1pp,
    "diffu_grpo": DiffuGrpo,
    "just_grpo": JustGrpo,
    "spg": Spg,
    "raft": Raft,
}

__all__ = ["OBJECTIVES", "Objective"]
