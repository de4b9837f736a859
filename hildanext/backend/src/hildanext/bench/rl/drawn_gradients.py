"""How much one draw of a likelihood's gradient is like the mean of many, on a real model and answers of its own.

Answers are dealt advantages of +1 and -1, half of each group, whatever they say: the noise of draws needs no reward,
and a model that solves nothing has none to give.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hildanext.bench.rl.enumerable import flat_gradient, parameters
from hildanext.bench.rl.gradient import RlGradientConfig, refused
from hildanext.core.errors import DataError
from hildanext.core.registry import build
from hildanext.core.runtime import machine, make_generator
from hildanext.data.problems import PROBLEMS
from hildanext.grading.rewards import REWARDS
from hildanext.models.bidirectional import DiffusionModel
from hildanext.rl.batch import RolloutBatch, collate
from hildanext.rl.likelihoods import PolicyLikelihood
from hildanext.rl.looks import Look, score
from hildanext.rl.measure import seed_of, tokens_per_forward
from hildanext.rl.policy import Policy
from hildanext.rl.rollouts import ROLLOUTS, Rollouts

Say = Callable[[str], None]

EXACT = "trajectory, all steps"
"""The one without noise, whose mean is the gradient of the sampler's actions."""


def measure_drawn(
    model: DiffusionModel, tokenizer: Any, settings: RlGradientConfig, profile: str, say: Say | None = None
) -> dict[str, Any]:
    """Cosines of single draws to the mean of `draws` others, and of the means to that of `EXACT` where it is there.

    Raises `ConfigError` and `DataError` as problems and rollouts do.
    """
    model.requires_grad_(True)
    policy = Policy(model, tokenizer, model.card.chat, adapters=False)
    rollouts = build("rollouts", ROLLOUTS, settings.rollouts)
    batch, forwards = _answers(policy, rollouts, settings, profile)
    dealt = _dealt(batch, settings.seed)
    means: dict[str, Tensor] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, (likelihood, by_length) in settings.built().items():
        no = refused(likelihood, model)
        if no is not None:
            rows[name] = no
            continue
        heat = rollouts.temperature if likelihood.of_actions else 1.0
        weight = dealt / (batch.length if by_length else 1)
        rows[name], means[name] = _compare(policy, batch, likelihood, weight, heat, settings)
        if say is not None:
            say(f"{name}: cosine {rows[name]['cosine']:.3f}")
    if EXACT in means:
        for name, mean in means.items():
            rows[name]["cosine_to_trajectory"] = _cosine(mean, means[EXACT])
    return {
        "answers": len(batch.tokens),
        "tokens": int(batch.length.sum()),
        "tokens_per_forward": forwards,
        "card_block": model.card.block_size,
        "alignment": model.card.alignment,
        "machine": machine(model.device, model.dtype),
        "estimates": rows,
    }


def _answers(
    policy: Policy, rollouts: Rollouts, settings: RlGradientConfig, profile: str
) -> tuple[RolloutBatch, float]:
    problems = build("problem set", PROBLEMS, settings.problems)
    reward = build("reward", REWARDS, {"name": problems.reward if problems.reward is not None else "gsm8k"})
    asked = problems.split(reward).train[: settings.asked]
    prompts = [policy.encode(problem) for problem in asked for _ in range(settings.group)]
    seeds = [seed_of(settings.seed, number) for number in range(len(prompts))]
    sampler = rollouts.open(policy, profile)
    try:
        answers = sampler.sample(prompts, seeds)
    finally:
        sampler.close()
    whole = [(number, answer) for number, answer in enumerate(answers) if answer is not None]
    if len(whole) < 2:
        raise DataError(f"{len(whole)} answers of {len(prompts)} were whole in time", "give rollouts more seconds")
    groups = [number // settings.group for number, _ in whole]
    batch = collate([answer for _, answer in whole], groups, policy.model.card.block_size, policy.end)
    return batch, tokens_per_forward(answers)


def _dealt(batch: RolloutBatch, seed: int) -> Float[Tensor, " rows"]:
    """+1 and -1, half of each group."""
    dealt = torch.zeros(len(batch.tokens), dtype=torch.float64)
    for group in sorted(set(batch.group.tolist())):
        rows = (batch.group == group).nonzero()[:, 0]
        order = torch.randperm(len(rows), generator=make_generator(seed, group))
        dealt[rows[order[: len(rows) // 2]]] = 1.0
        dealt[rows[order[len(rows) // 2 :]]] = -1.0
    return dealt


def _compare(
    policy: Policy,
    batch: RolloutBatch,
    likelihood: PolicyLikelihood,
    weight: Float[Tensor, " rows"],
    heat: float,
    settings: RlGradientConfig,
) -> tuple[dict[str, Any], Tensor]:
    """The mean over `draws`, then how much each of `singles` others is like it."""
    likelihood.check_batch(batch)

    def looks(number: int) -> list[Look]:
        return likelihood.draw(batch, policy.model.card, make_generator(settings.seed, number))

    columns = 0

    def gradient(number: int) -> Tensor:
        nonlocal columns
        scores = score(policy.model, batch, looks(number), heat, packed=True, actions=likelihood.of_actions)
        columns = scores.columns
        return flat_gradient((scores.sequence * weight.to(scores.raw)).sum() / len(weight), parameters(policy.model))

    noisy = not _same(looks(0), looks(1))
    count = settings.draws if noisy else 1
    mean = torch.zeros(())
    for number in range(count):
        mean = mean + gradient(number).double() / count
    singles = [gradient(count + number).double() for number in range(settings.singles)] if noisy else [mean]
    cosines = [_cosine(one, mean) for one in singles]
    apart = sum(float((one - mean).square().sum()) for one in singles) / len(singles)
    return {
        "draws": count,
        "cosine": sum(cosines) / len(cosines),
        "cosines": cosines,
        "noise": apart / float(mean.square().sum()),
        "columns": columns / len(batch.tokens),
    }, mean


def _same(one: list[Look], other: list[Look]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.read, b.read) and torch.equal(a.weight, b.weight) and torch.equal(a.masked, b.masked)
        for a, b in zip(one, other, strict=True)
    )


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))
