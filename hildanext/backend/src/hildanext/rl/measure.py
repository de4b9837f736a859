"""What a policy can do on problems that it is never trained on: greedy and sampled accuracy, pass@k, and how varied."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hildanext.core.statistics import wilson
from hildanext.data.problems import Problem
from hildanext.grading.base import Reward, checked_scores
from hildanext.rl.batch import Answer
from hildanext.rl.policy import Policy
from hildanext.rl.rollouts.base import Sampler

SOLVED = 1e-6
"""An answer is right when its reward is the highest there is, less this."""


def seed_of(*keys: object) -> int:
    """A request's seed, of whatever names it."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


class Measure:
    """Asks `problems`, always the same ones in the same way."""

    def __init__(self, policy: Policy, sampler: Sampler, problems: Sequence[Problem], reward: Reward) -> None:
        self.policy, self.sampler, self.problems, self.reward = policy, sampler, problems, reward
        self.prompts = [policy.encode(problem) for problem in problems]

    def greedy(self) -> dict[str, Any]:
        """The answers of temperature 0: accuracy with its 95 % interval (Wilson's), reward, tokens per forward."""
        answers = self.sampler.sample(self.prompts, [seed_of("greedy", i) for i in range(len(self.prompts))], 0.0)
        rewards = self._rewards(answers, self.problems)
        right = [reward is not None and reward >= self.reward.highest - SOLVED for reward in rewards]
        low, high = wilson(sum(right), len(right))
        judged = [reward for reward in rewards if reward is not None]
        return {
            "accuracy": sum(right) / len(right),
            "accuracy_low": low,
            "accuracy_high": high,
            "reward": float(np.mean(judged)) if judged else 0.0,
            "ended": _mean([answer.ended for answer in answers if answer is not None]),
            "length": _mean([len(answer.tokens) for answer in answers if answer is not None]),
            "tokens_per_forward": tokens_per_forward(answers),
            "right": "".join("1" if one else "0" for one in right),
        }

    def sampled(self, samples: int) -> dict[str, Any]:
        """`samples` answers to each problem at the rollouts' temperature: accuracy, pass@`samples`, and the share of
        problems whose answers all earn the same; `sampled_right` counts the right ones of each problem."""
        places = [(problem, number) for problem in range(len(self.problems)) for number in range(samples)]
        answers = self.sampler.sample(
            [self.prompts[problem] for problem, _ in places], [seed_of("sampled", *place) for place in places]
        )
        rewards = self._rewards(answers, [self.problems[problem] for problem, _ in places])
        numbers = np.array([np.nan if reward is None else reward for reward in rewards]).reshape(-1, samples)
        right = numbers >= self.reward.highest - SOLVED
        same = [len(set(row[~np.isnan(row)].tolist())) <= 1 for row in numbers]
        return {
            "sampled_accuracy": float(right.mean()),
            f"pass_at_{samples}": float(right.any(-1).mean()),
            "zero_variance": float(np.mean(same)),
            "unique": unique_answers(answers, samples),
            "sampled_right": " ".join(str(int(count)) for count in right.sum(-1)),
        }

    def _rewards(self, answers: Sequence[Answer | None], problems: Sequence[Problem]) -> list[float | None]:
        whole = [(answer, problem) for answer, problem in zip(answers, problems, strict=True) if answer is not None]
        scores, _ = checked_scores(
            self.reward, [problem.row for _, problem in whole], [answer.text for answer, _ in whole]
        )
        told = iter(scores)
        return [None if answer is None else next(told) for answer in answers]


def tokens_per_forward(answers: Sequence[Answer | None]) -> float:
    """Tokens of all answers over the forwards that each took part in; 0 where nobody tells forwards."""
    whole = [answer for answer in answers if answer is not None]
    forwards = sum(answer.forwards for answer in whole)
    return sum(len(answer.tokens) for answer in whole) / forwards if forwards else 0.0


def unique_answers(answers: Sequence[Answer | None], group: int) -> float:
    """Different texts in a group of answers, over its size; the mean over groups."""
    groups = [answers[at : at + group] for at in range(0, len(answers), group)]
    return _mean([len({answer.text for answer in one if answer is not None}) / group for one in groups])


def nothing_to_learn(start: Mapping[str, Any], samples: int) -> str | None:
    """In words, where the start says that there is little to learn from; else None."""
    if not samples:
        return None
    if start["zero_variance"] > 0.9:
        return (
            f"the answers to {start['zero_variance']:.0%} of the held-out problems all earn the same, which "
            "teaches nothing: raise the temperature, give easier problems, or fine-tune on some noise first"
        )
    if start[f"pass_at_{samples}"] < 0.05:
        share = start[f"pass_at_{samples}"]
        return f"of {samples} answers one is right for {share:.0%} of the held-out problems: give easier ones first"
    return None


def _mean(values: Sequence[float | bool | int]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
