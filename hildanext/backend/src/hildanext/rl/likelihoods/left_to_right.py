"""log p of every token given those before it: exact for answers that are written one token after another."""

import torch

from hildanext.core.config import config
from hildanext.core.errors import ConfigError
from hildanext.models.card import Card
from hildanext.rl.batch import RolloutBatch
from hildanext.rl.likelihoods.base import PolicyLikelihood
from hildanext.rl.looks import Look


@config
class LeftToRight(PolicyLikelihood):
    """One look at block size 1. Under the `parent` alignment that is one forward of clean copies alone.

    Paper: JustGRPO, arXiv:2601.15165.
    Differs: there one forward for each token, with the rest of the answer shown as masks; here a token's block is the
    token, and nothing of what follows is seen. `check` raises `ConfigError` for a checkpoint of the `block` alignment
    with larger blocks, which has never learned such ones.
    """

    def check(self, card: Card) -> None:
        if card.alignment == "block" and card.block_size > 1:
            raise ConfigError(
                f"left_to_right reads blocks of 1, and the checkpoint is of alignment 'block' with blocks of "
                f"{card.block_size}, which has no such mode",
                "take trajectory (answers of the decoder ordered, order left_to_right) or a checkpoint of alignment "
                "'parent'",
            )

    def draw(self, batch: RolloutBatch, card: Card, generator: torch.Generator) -> list[Look]:
        self.check(card)
        return [Look(batch.open, batch.scored, batch.scored.double(), 1)]
