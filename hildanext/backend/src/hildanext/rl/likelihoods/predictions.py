"""log p of a finished answer as the last of its predictions: each block's last tokens, given the state before them."""

import torch

from hildanext.core.config import config
from hildanext.core.errors import ConfigError
from hildanext.models.card import Card
from hildanext.rl.batch import RolloutBatch
from hildanext.rl.likelihoods.base import PolicyLikelihood
from hildanext.rl.looks import Look
from hildanext.rl.replay import Replay


@config
class Predictions(PolicyLikelihood):
    """One look: each block before its last step, read what that step wrote, by the model's own law.

    What `wd1pp` needs of an answer beside its intermediate predictions, each of which has a look of its own
    (`rl.predictions`). Neither log p of the answer nor a bound on it. `check_batch` raises `ConfigError` for answers
    whose steps are not known, and for edited ones.

    Paper: wd1++, arXiv:2507.08838v2, section 3.3: the last prediction is the answer.
    Differs: the last step is that of each block; a state of all blocks at once has every other block finished.
    """

    def check_batch(self, batch: RolloutBatch) -> None:
        if not batch.traced:
            raise ConfigError(
                "predictions are learnt in the states they were made in, and the steps of these answers are not known",
                "take rollouts of the engine, or the objective wd1",
            )
        if len(batch.edits):
            raise ConfigError(
                f"the answers hold {len(batch.edits)} edits, so that the last prediction is not the answer",
                "take a decoder without edits such as ordered",
            )

    def draw(self, batch: RolloutBatch, card: Card, generator: torch.Generator) -> list[Look]:
        self.check_batch(batch)
        replay = Replay.of(batch, card.block_size)
        look = replay.look(replay.steps - 1, replay.steps)
        read = look.read & batch.scored
        return [Look(look.masked, read, read.double(), card.block_size)]
