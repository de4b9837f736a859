"""How far each likelihood's policy gradient is off the exact one, and how it scatters: `hildanext bench rl-gradient`.

On a policy whose every trajectory is listed (`enumerable`) an estimate of one answer is (r - E[r]) grad log p, with log
p as the likelihood has it. Its mean over trajectories and draws is compared with the gradient of E[r]. On a real model
(`drawn_gradients`) there is no exact one: single draws are compared with the mean of many.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from hildanext.bench.rl.enumerable import Enumeration, enumerate_policy, flat_gradient, parameters, small_policy
from hildanext.core.config import Seed, config
from hildanext.core.errors import ConfigError
from hildanext.core.registry import build
from hildanext.core.runtime import make_generator
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.card import Alignment
from hildanext.rl.batch import RolloutBatch
from hildanext.rl.likelihoods import POLICY_LIKELIHOODS, PolicyLikelihood
from hildanext.rl.looks import Look, score

USUAL: dict[str, dict[str, Any]] = {
    "block_elbo, 1 draw": {"likelihood": {"name": "block_elbo", "draws": 1}},
    "block_elbo, 2 draws": {"likelihood": {"name": "block_elbo", "draws": 2}},
    "block_elbo, 4 draws": {"likelihood": {"name": "block_elbo", "draws": 4}},
    "espo: block_elbo / length": {"likelihood": {"name": "block_elbo", "draws": 1}, "by_length": True},
    "mean_field": {"likelihood": {"name": "mean_field"}},
    "trajectory, all steps": {"likelihood": {"name": "trajectory"}},
    "trajectory, 1 step, uniform": {"likelihood": {"name": "trajectory", "steps": 1}},
    "trajectory, 2 steps, uniform": {"likelihood": {"name": "trajectory", "steps": 2}},
    "trajectory, 1 step, entropy": {"likelihood": {"name": "trajectory", "steps": 1, "chosen": "entropy"}},
    "trajectory, 2 steps, entropy": {"likelihood": {"name": "trajectory", "steps": 2, "chosen": "entropy"}},
    "left_to_right": {"likelihood": {"name": "left_to_right"}},
}


@config
class EstimateConfig:
    """An estimate of grad log p."""

    likelihood: dict[str, Any]
    by_length: bool = False
    """Divided by the answer's tokens, as ESPO's ratio is."""


@config
class SmallPolicyConfig:
    """The policy whose every trajectory is listed."""

    vocab: int = Field(default=3, ge=2, le=5)
    """Tokens, the end of text among them."""
    block_size: int = Field(default=3, ge=2, le=4)
    per_step: int = Field(default=1, ge=1)
    """Masks that a forward fills."""
    alignment: Alignment = "parent"
    """`block` has no `left_to_right`."""
    repeats: int = Field(default=64, ge=2)
    """Draws of each estimate at every trajectory."""


@config
class RlGradientConfig:
    """The small policy, the estimates, and what is drawn of a real model. All likelihoods but block_elbo are FULL."""

    estimates: dict[str, EstimateConfig] = Field(
        default_factory=lambda: {name: EstimateConfig(**section) for name, section in USUAL.items()}
    )
    small: SmallPolicyConfig = SmallPolicyConfig()
    draws: int = Field(default=64, ge=0)
    """Of a real model's gradient, whose mean single draws are compared with; 0 leaves the real model out."""
    singles: int = Field(default=8, ge=1)
    """Further draws that are compared."""
    problems: dict[str, Any] = Field(
        default_factory=lambda: {"name": "arithmetic", "count": 200, "largest": 9, "steps": 1}
    )
    asked: int = Field(default=2, ge=1)
    """Problems that the real model answers."""
    group: int = Field(default=8, ge=2)
    """Answers to each."""
    rollouts: dict[str, Any] = Field(default_factory=lambda: {"name": "engine", "max_new_tokens": 24})
    seed: Seed = 0

    def __post_init__(self) -> None:
        if not self.estimates:
            raise ConfigError("bench rl-gradient has no estimates", 'give {"name": {"likelihood": {"name": ...}}}')
        self.built()

    def built(self) -> dict[str, tuple[PolicyLikelihood, bool]]:
        """The likelihoods by the names of their estimates, and whether lengths divide them."""
        return {
            name: (build("likelihood", POLICY_LIKELIHOODS, one.likelihood), one.by_length)
            for name, one in self.estimates.items()
        }


@dataclass
class Bank:
    """Gradients of single log-probabilities of a small policy, each computed once."""

    model: DiffusionModel
    place: dict[tuple[Any, ...], int] = field(default_factory=dict)
    gradients: list[Tensor] = field(default_factory=list)

    def numbers(self, batch: RolloutBatch, look: Look, row: int) -> list[tuple[int, int]]:
        """Position and number of the gradient of everything that a look reads in a row."""
        read = look.read[row].nonzero()[:, 0].tolist()
        state = (look.block_size, tuple(look.masked[row].tolist()), tuple(batch.tokens[row].tolist()))
        if read and (*state, read[0]) not in self.place:
            every = Look(look.masked[[row]], look.masked[[row]], look.masked[[row]].double(), look.block_size)
            raw, wanted = score(self.model, batch.rows([row]), [every]).raw[0, 0], parameters(self.model)
            for position in look.masked[row].nonzero()[:, 0].tolist():
                self.place[*state, position] = len(self.gradients)
                self.gradients.append(flat_gradient(raw[position], wanted, retain=True))
        return [(position, self.place[*state, position]) for position in read]

    def matrix(self) -> Float[Tensor, "known parameters"]:
        return torch.stack(self.gradients)


def measure_small(settings: RlGradientConfig, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Bias and variance of every estimate on the small policy, or why a likelihood refuses it."""
    model = small_policy(settings.small.vocab, settings.small.block_size, settings.small.alignment, settings.seed)
    everything = enumerate_policy(model, settings.small.per_step, settings.seed)
    bank = Bank(model)
    rows = {}
    for name, (likelihood, by_length) in settings.built().items():
        rows[name] = refused(likelihood, model) or estimate(everything, bank, likelihood, by_length, settings)
        if say is not None:
            say(f"small policy: {name}")
    return {
        "texts": settings.small.vocab**settings.small.block_size,
        "trajectories": len(everything.chance),
        "parameters": len(everything.gradient),
        "value": everything.value,
        "gradient_norm": float(everything.gradient.norm()),
        "estimates": rows,
    }


def refused(likelihood: PolicyLikelihood, model: DiffusionModel) -> dict[str, str] | None:
    """Why a likelihood makes no sense for a model, or None."""
    try:
        likelihood.check(model.card)
    except ConfigError as problem:
        return {"refused": problem.message}
    return None


def estimate(
    everything: Enumeration, bank: Bank, likelihood: PolicyLikelihood, by_length: bool, settings: RlGradientConfig
) -> dict[str, float]:
    """Moments of an estimate over trajectories, by their chances, and draws."""
    batch, card = everything.batch, everything.model.card
    weight = everything.advantage / (batch.length if by_length else 1)
    means: list[Any] = []
    squares: list[Any] = []
    columns = 0
    before: list[tuple[int, int, float]] = []
    for repeat in range(settings.small.repeats):
        looks = likelihood.draw(batch, card, make_generator(settings.seed, repeat))
        entries = [
            (row, number, float(look.weight[row, position]))
            for look in looks
            for row in range(len(batch.tokens))
            for position, number in bank.numbers(batch, look, row)
        ]
        if repeat == 1 and entries == before:  # it has no noise: all further draws are this one
            means.append(means[0])
            break
        before = entries
        known = bank.matrix()
        coefficients = torch.zeros(len(batch.tokens), len(known), dtype=torch.float64)
        where = torch.tensor([entry[:2] for entry in entries]).unbind(1)
        values = torch.tensor([entry[2] for entry in entries], dtype=torch.float64)
        coefficients.index_put_(tuple(where), values, accumulate=True)
        single = weight[:, None] * (coefficients @ known)
        means.append(everything.chance @ single)
        squares.append(float(everything.chance @ single.square().sum(1)))
        if repeat == 0:
            with torch.no_grad():
                columns = score(everything.model, batch, looks).columns
    return moments(torch.stack(means), sum(squares) / len(squares), everything.gradient) | {
        "columns": columns / len(batch.tokens)
    }


def moments(
    means: Float[Tensor, "repeats parameters"], square: float, exact: Float[Tensor, " parameters"]
) -> dict[str, float]:
    """What is said of an estimate whose repeats have these means, and whose squared norm this mean.

    `scale` is what multiplies its mean to come nearest to the exact gradient; `bias` is how far it is off then and
    `bias_as_is` without, as a share of the exact norm, both less what the finite number of draws adds; `variance` is
    the trace of the covariance of one answer's estimate, times scale squared, over the squared exact norm: so many
    answers have as much noise as signal.
    """
    mean, norm = means.mean(0), float(exact.norm())
    noise = float((means - mean).square().sum()) / (len(means) * (len(means) - 1))
    squared = max(float(mean.square().sum()) - noise, 0.0)
    inner = float(mean @ exact)
    scale = inner / squared if squared > 0 else math.nan
    off = [float((factor * mean - exact).square().sum()) - factor**2 * noise for factor in (scale, 1.0)]
    bias, as_is = (math.sqrt(max(one, 0.0)) / norm if one == one else math.nan for one in off)
    return {
        "cosine": min(1.0, inner / (math.sqrt(squared) * norm)) if squared > 0 else math.nan,
        "scale": scale,
        "bias": bias,
        "bias_as_is": as_is,
        "bias_error": abs(scale) * math.sqrt(noise) / norm,
        "variance": scale**2 * (square - squared) / norm**2,
        "variance_as_is": (square - squared) / norm**2,
    }


def error_after(row: Mapping[str, float], columns: float) -> float:
    """Root mean square error of the mean over as many answers as columns pay for, as a share of the exact norm."""
    return math.sqrt(row["bias"] ** 2 + row["variance"] * row["columns"] / columns)
