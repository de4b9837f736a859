"""What a plugin is: three hooks in a round. Without plugins a round is, bit for bit, what it was before there were any.

| hook | called | may change |
|---|---|---|
| `ask` | for every answer before it is sampled | its wish (given tokens, knobs of the decoder), what is shown |
| `more` | once for each chunk of judged answers, before the first update | which answers are learnt of, and how |
| `looks` | for every group and update, after the likelihood drew | the masks, and their weights |

What a hook does is a pure function of the weights, the problems and the seeds; what it samples, says or judges goes
through the `Desk`, which keeps it.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol, runtime_checkable

import torch

from hildanext.core.config import config
from hildanext.grading.base import Reward
from hildanext.rl.advantages import Advantage
from hildanext.rl.batch import RolloutBatch
from hildanext.rl.desk import Ask, Desk
from hildanext.rl.likelihoods import PolicyLikelihood
from hildanext.rl.looks import Look
from hildanext.rl.material import Material
from hildanext.rl.objectives import Objective
from hildanext.rl.rollouts import Rollouts


@runtime_checkable
class Around(Protocol):
    """The parts of a run that a plugin works with."""

    @property
    def reward(self) -> Reward: ...
    @property
    def objective(self) -> Objective: ...
    @property
    def likelihood(self) -> PolicyLikelihood: ...
    @property
    def advantage(self) -> Advantage: ...
    @property
    def rollouts(self) -> Rollouts: ...
    @property
    def plugins(self) -> "Mapping[str, Plugin]": ...


@config
class Plugin:
    """Members are frozen knobs."""

    research: ClassVar[bool] = True
    """Built under the profile FULL alone."""

    def check(self, around: Around) -> None:
        """Raises `ConfigError` for a run, or another plugin, that it contradicts."""

    def ask(self, ask: Ask, desk: Desk) -> Ask:
        """The answer as it is to be sampled. Raises `ConfigError` for a problem that it cannot serve."""
        return ask

    def more(self, material: Material, desk: Desk) -> Material:
        """What is learnt of a chunk's judged answers. Figures have the same names for every chunk."""
        return material

    def looks(
        self, batch: RolloutBatch, looks: Sequence[Look], of_actions: bool, generator: torch.Generator
    ) -> list[Look]:
        """The looks at a group, which a likelihood drew that is `of_actions` or not. Old and new policy and reference
        see the same ones."""
        return list(looks)
