"""A lower bound on log p of the text, from complementary masks of every block at once."""

from typing import ClassVar

import torch
from pydantic import Field

from hildanext.core.config import config
from hildanext.diffusion import block_index
from hildanext.likelihood import LIKELIHOODS
from hildanext.models.card import Card
from hildanext.rl.batch import RolloutBatch
from hildanext.rl.likelihoods.base import PolicyLikelihood
from hildanext.rl.looks import Look


@config
class BlockElbo(PolicyLikelihood):
    """Two looks a draw: k of a block's n scored tokens masked, k uniform in 0..n, and then the other n - k.

    Weights are (n+1)/k and (n+1)/(n-k), halved, over the draws: the expected sum is the bound of each block given the
    blocks before it, and every token is read once in every draw. The levels of a block's draws are stratified.

    Paper: ESPO, arXiv:2512.03759, the coupled pair; EBPO of LLaDA2.1, arXiv:2602.08676, all blocks of a noise level in
    one forward.
    Differs: n counts the tokens up to and including the end of text, in each block; ESPO's is the full length of the
    generation, padding included. What stands behind the text is always shown as masks. The noise is drawn once and
    kept, from a generator of its own, and no ratio depends on how a batch is cut.
    """

    research: ClassVar[bool] = False

    draws: int = Field(default=1, ge=1)
    """Per block, at two forwards each."""

    def draw(self, batch: RolloutBatch, card: Card, generator: torch.Generator) -> list[Look]:
        blocks = block_index(batch.document, batch.position, card.block_size)
        coupled = LIKELIHOODS["coupled"](draws=self.draws)
        looks = []
        for pair in coupled.noisings(batch.scored, blocks, generator):
            for masked, weight in pair:
                halved = torch.where(masked, weight, 0.0) / (len(pair) * self.draws)
                looks.append(Look(masked | batch.after, masked, halved, card.block_size))
        return looks
