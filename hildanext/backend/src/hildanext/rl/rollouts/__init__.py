"""Who samples the answers. To add one: write the file, add its row, add its case."""

from hildanext.rl.rollouts.base import Rollouts, Sampler
from hildanext.rl.rollouts.engine import EngineRollouts
from hildanext.rl.rollouts.openai import OpenAIRollouts

ROLLOUTS: dict[str, type[Rollouts]] = {
    "engine": EngineRollouts,
    "openai": OpenAIRollouts,
}

__all__ = ["ROLLOUTS", "Rollouts", "Sampler"]
