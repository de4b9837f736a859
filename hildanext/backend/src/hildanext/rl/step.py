"""What the loop trains: the policy and its objective as one module."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hildanext.losses.step import Outcome, TrainingStep
from hildanext.models.bidirectional import DiffusionModel
from hildanext.rl.batch import RolloutBatch
from hildanext.rl.looks import Look, Scores, score
from hildanext.rl.objectives.base import Objective, PolicyInputs


@dataclass(frozen=True)
class PolicyView:
    """A micro-batch of an update: whole groups, what is looked at, and what was known before the update."""

    batch: RolloutBatch
    looks: Sequence[Look]
    advantage: Float[Tensor, " rows"]
    valid: Bool[Tensor, " rows"]
    count: int
    """What it adds to the normaliser of the step."""
    old: Float[Tensor, "looks rows positions"] | None = None
    """log p of what is read, under the policy that wrote the answers; None: that is the policy of now."""
    reference: Float[Tensor, "looks rows positions"] | None = None
    recorded: Float[Tensor, "looks rows positions"] | None = None
    """The sampler's own numbers for what is read, where nothing has changed since: to compare with."""
    asked: Sequence[tuple[int, ...] | None] | None = None
    """The prompt that each row was written under, where that is another one; None: in no row."""


class PolicyStep(TrainingStep):
    """A policy and its objective. Views are `PolicyView`s."""

    by = "t"
    buckets = ()
    guarded = False

    def __init__(
        self,
        model: DiffusionModel,
        objective: Objective,
        temperature: float,
        chunk: int,
        packed: bool,
        actions: bool = False,
    ) -> None:
        """`temperature` divides the logits: the sampler's, where the likelihood is of its actions; else 1."""
        super().__init__()
        self.model = model
        self.objective, self.temperature, self.chunk = objective, temperature, chunk
        self.packed, self.actions = packed, actions
        self._extremes: dict[str, Tensor] = {}
        self.columns = 0

    def scores(self, model: DiffusionModel, batch: RolloutBatch, looks: Sequence[Look]) -> Scores:
        """Log-probabilities of a batch under a model's weights: now, of the reference, or with gradients."""
        return score(model, batch, looks, self.temperature, self.chunk, self.packed, self.actions)

    def forward(
        self,
        view: PolicyView,
        mask_noise: float = 0.0,
        generator: torch.Generator | None = None,
        teacher_hidden: Tensor | None = None,
        wants_draft: bool = False,
        progress: float = 0.0,
    ) -> Outcome:
        """The objective's sum over a view, and its figures as losses."""
        now = self.scores(self.model, view.batch, view.looks)
        inputs = PolicyInputs(
            now=now,
            old=_known(now, view.old),
            reference=None if view.reference is None else _known(now, view.reference),
            advantage=view.advantage.to(now.raw),
            valid=view.valid.to(now.raw.device),
            group=view.batch.group.to(now.raw.device),
        )
        loss, figures = self.objective.loss(inputs)
        self._note(inputs, view)
        empty: Int[Tensor, " buckets"] = torch.zeros(0, dtype=torch.long, device=loss.device)
        return Outcome(
            loss + 0.0 * now.raw.sum(), {name: value.detach() for name, value in figures.items()}, empty, empty
        )

    def countable(self, view: PolicyView) -> Tensor:
        return torch.tensor(view.count)

    @torch.no_grad()
    def _note(self, inputs: PolicyInputs, view: PolicyView) -> None:
        """Keep the largest ratio of a token, its largest distance from the reference in nats, and how far the replay is
        off what was recorded, where these are known."""
        read = inputs.now.read & inputs.valid[None, :, None]
        ratio = (inputs.now.raw - inputs.old.raw) * read
        if view.asked is not None:  # whose ratios are not 1 before the first update either
            own = torch.tensor([prompt is None for prompt in view.asked], device=ratio.device)
            ratio = ratio * own[None, :, None]
        apart = {"ratio_max": ratio.amax().exp()}
        if inputs.reference is not None:
            apart["reference_max"] = ((inputs.now.raw - inputs.reference.raw) * read).abs().amax()
        if view.recorded is not None:
            apart["replay_off"] = ((inputs.now.raw - view.recorded.to(inputs.now.raw)) * read).abs().amax()
        for name, value in apart.items():
            known = self._extremes.get(name)
            self._extremes[name] = value if known is None else torch.maximum(known, value)
        self.columns += inputs.now.columns

    def extremes(self) -> dict[str, float]:
        numbers = {name: float(value) for name, value in self._extremes.items()}
        numbers["columns"] = float(self.columns)
        self._extremes, self.columns = {}, 0
        return numbers


def _known(now: Scores, raw: Tensor | None) -> Scores:
    return now.detach() if raw is None else replace(now, raw=raw.to(now.raw))
