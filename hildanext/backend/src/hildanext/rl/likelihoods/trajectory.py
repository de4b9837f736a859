"""log p of what the sampler did: each action given the state in which it was taken."""

from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.core.errors import ConfigError
from hildanext.models.card import Card
from hildanext.rl.batch import RolloutBatch
from hildanext.rl.likelihoods.base import PolicyLikelihood
from hildanext.rl.looks import Look
from hildanext.rl.replay import Replay


@config
class TrajectoryLikelihood(PolicyLikelihood):
    """One look for each step of a block, at all blocks at once: as many forwards as a block has steps are exact.

    Which positions a step fills must not depend on the policy (random order, or from left to right): the sum is then
    log p of the actions but for a constant, and its gradient the true one. It holds for the path that was taken, not
    for the text, which other paths lead to as well. Tokens behind the end of text are actions too.

    With `steps` a number, each block's steps are drawn, with weights `1 / (steps * p(step))`: the mean is the sum over
    all steps. `segments` is deterministic: what a segment of the steps wrote is read in its first state.

    Where the sampler has top-k or top-p, the law is what they leave: recorded is how many tokens they left, and a
    policy's law is that of the token that was drawn and so many of its likeliest others less one. Under the policy that
    wrote them that is the sampler's law, its gradient too. Later the tokens that are left are those of the policy then,
    which is the sampler's law under top-k; under top-p the number stays what it was. A token that would no longer be
    left stands in the place of the last one that is, so that its log p is finite and has no jumps.

    Raises `ConfigError` for knobs that contradict each other, and `check_batch` for rollouts without steps, edited
    ones (but for `edits: count`) and biased ones (but for `biased: allow`).

    Paper: AGRPO, arXiv:2510.04019 (sampled steps, their low discrepancy, arXiv:2409.02908, and their weights by
    entropy); StepMerge of d2, arXiv:2509.21474 (segments); TraceRL, arXiv:2509.06949 (all steps).
    Differs: steps are drawn for each block, as a forward replays one step of every block; the estimate is of the sum
    over steps, AGRPO's is of their mean (`1/T` of it); every step that wrote is a step, AGRPO leaves out those that
    wrote ends of text alone, and fails where there are no others. AGRPO stores which tokens top-k and top-p left, at a
    row of the vocabulary a token, and keeps these for every policy; here it is how many, one number, which rounding of
    a replay cannot change.
    """

    of_actions: ClassVar[bool] = True

    steps: Literal["all"] | Annotated[int, Field(ge=1)] = "all"
    """Forwards: every step, or this many draws of each block."""
    chosen: Literal["uniform", "entropy"] = "uniform"
    """Chance of a step to be drawn: the same for all, or in proportion to the entropy of its laws."""
    segments: int | None = Field(default=None, ge=1)
    """Instead of steps: forwards, of which each stands for an equal share of every block's steps."""
    edits: Literal["refuse", "count"] = "refuse"
    """Count an edit as an action of its step, or refuse answers that have any."""
    biased: Literal["refuse", "allow"] = "refuse"
    """Answers whose sampler chose positions by what it had drawn: the sum is then not log p of the actions."""

    def __post_init__(self) -> None:
        if self.segments is not None and self.steps != "all":
            raise ConfigError(f"trajectory has segments {self.segments} and steps {self.steps}", "give one of the two")
        if self.chosen == "entropy" and self.steps == "all":
            raise ConfigError("trajectory is to draw by entropy, and reads all steps", "give steps, a number")
        if self.edits == "count" and (self.segments is not None or self.chosen == "entropy"):
            what = "draws by entropy" if self.segments is None else f"has segments {self.segments}"
            raise ConfigError(
                f"trajectory counts edits and {what}",
                "leave that out: a segment may hold two actions of a position, and edits have no recorded entropy",
            )

    def check_batch(self, batch: RolloutBatch) -> None:
        if not batch.traced:
            count = int((batch.written & (batch.step < 0)).any(-1).sum())
            raise ConfigError(
                f"of {count} answers the steps are not known in which they were written",
                "take rollouts of the engine local (openai tells no steps), or the likelihood block_elbo",
            )
        if len(batch.edits) and batch.kept is not None:
            raise ConfigError(
                f"{len(batch.edits)} edits were drawn under top_k or top_p, whose law is recorded of fillings alone",
                "leave top_k and top_p out, or take a decoder without edits such as ordered",
            )
        if len(batch.edits) and self.edits == "refuse":
            count = len(set(batch.edits[:, 0].tolist()))
            raise ConfigError(
                f"{count} answers hold {len(batch.edits)} edits, which a trajectory of fillings does not have",
                "give edits: count, or a decoder without edits such as ordered",
            )
        if bool(batch.biased) and self.biased == "refuse":
            raise ConfigError(
                "what the sampler drew decided where it wrote: log p of the tokens is not that of the actions",
                "take the decoder ordered in order random or left_to_right, or give biased: allow",
            )

    def draw(self, batch: RolloutBatch, card: Card, generator: torch.Generator) -> list[Look]:
        self.check_batch(batch)
        replay = Replay.of(batch, card.block_size)
        if self.segments is not None:
            ends = [replay.steps * number // self.segments for number in range(self.segments + 1)]
            return [replay.look(first, until) for first, until in zip(ends, ends[1:], strict=False)]
        if self.steps == "all":
            at = [torch.full_like(replay.steps, step) for step in range(int(replay.steps.max()))]
            return [replay.look(step, step + 1) for step in at]
        p = replay.chances(by_entropy=self.chosen == "entropy")
        drawn = draw_steps(p, replay.steps, self.steps, generator)
        weights = 1.0 / (self.steps * p.gather(1, drawn).clamp_min(torch.finfo(p.dtype).tiny))
        return [replay.look(at, at + 1, weight) for at, weight in zip(drawn.unbind(1), weights.unbind(1), strict=True)]


def draw_steps(
    p: Float[Tensor, "blocks steps"], steps: Int[Tensor, " blocks"], draws: int, generator: torch.Generator
) -> Int[Tensor, "blocks draws"]:
    """Draws of each block's step by `p`, 0 for a block without steps.

    Low discrepancy: of S uniform numbers, for all draws of all blocks that have steps, one lies in each [k/S, (k+1)/S).
    """
    having = steps > 0
    size = int(having.sum()) * draws
    place = torch.randperm(size, generator=generator)
    uniform = (place + torch.rand(size, generator=generator, dtype=torch.float64)) / size
    drawn = torch.zeros(len(p), draws, dtype=torch.long)
    below = p[having].cumsum(-1)[:, None] <= uniform.view(-1, draws, 1)
    drawn[having] = torch.minimum(below.sum(-1), steps[having, None] - 1)
    return drawn
