"""What an estimate of log p of an answer is: the looks that it takes."""

from typing import ClassVar

import torch

from hildanext.core.config import config
from hildanext.models.card import Card
from hildanext.rl.batch import RolloutBatch
from hildanext.rl.looks import Look


@config
class PolicyLikelihood:
    """Draws the looks whose weighted sum estimates log p of an answer. Members are frozen knobs."""

    research: ClassVar[bool] = True
    """Built under the profile FULL alone."""
    caveat: ClassVar[str | None] = None
    """What a run that takes it is told at its start."""
    of_actions: ClassVar[bool] = False
    """Whether it scores what the sampler did, by the sampler's law (its temperature); else what the text is, by the
    model's own."""

    def check(self, card: Card) -> None:
        """Raises `ConfigError` where the estimate makes no sense for a checkpoint's conventions."""

    def check_batch(self, batch: RolloutBatch) -> None:
        """Raises `ConfigError` for rollouts that it cannot score (of which no steps are known, or edited ones)."""

    def draw(self, batch: RolloutBatch, card: Card, generator: torch.Generator) -> list[Look]:
        """The looks at a batch. All noise comes from the generator, which lies on the CPU."""
        raise NotImplementedError(f"{type(self).__name__} draws no looks")
