"""A sum of rewards: each part has a name and a weight, and the sum a declared range."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from pydantic import Field

from hildanext import grading
from hildanext.core.config import config
from hildanext.core.errors import ConfigError
from hildanext.core.registry import build
from hildanext.grading.base import Reward, Scores, check_range

MOST_FORM = 0.2


@config
class Part:
    """One summand."""

    reward: dict[str, Any]
    """Its section, `{"name": ...}`."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)


@config
class WeightedReward(Reward):
    """The sum of weight times score. An answer that one part could not judge is not judged at all.

    `{"parts": {"right": {"reward": {"name": "countdown"}}, "form": {"reward": {"name": "format"}, "weight": 0.1}}}`.
    Parts that look at the form alone may be worth a fifth of the others at most: beyond that the form is learnt and the
    answers are not.
    """

    parts: dict[str, Part] = Field(min_length=1)
    at_most: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """The declared end of the range, which parts that could sum to more are refused for; default: what they sum to."""

    def __post_init__(self) -> None:
        """Raises `ConfigError` for parts that cannot be built or sum to more than is declared."""
        form = sum(self._most(name) for name, reward in self._built.items() if reward.form_only)
        sense = sum(self._most(name) for name, reward in self._built.items() if not reward.form_only)
        if sense and form > MOST_FORM * sense + 1e-9:
            raise ConfigError(
                f"the form is worth {form:g} beside {sense:g} for what answers say",
                f"lower its weight to {MOST_FORM * sense:g} in all, or the form is learnt and the answers are not",
            )
        if self.at_most is not None and form + sense > self.at_most + 1e-9:
            raise ConfigError(
                f"the parts sum to {form + sense:g}, more than at_most {self.at_most:g}",
                "lower weights, or raise at_most",
            )

    @property
    def highest(self) -> float:
        return self.at_most if self.at_most is not None else sum(map(self._most, self.parts))

    @property
    def form_names(self) -> tuple[str, ...]:
        """Parts that look at the form alone."""
        return tuple(name for name, reward in self._built.items() if reward.form_only)

    def check(self, problem: Mapping[str, Any]) -> None:
        """A row has what every part needs."""
        for reward in self._built.values():
            reward.check(problem)

    def score(self, problems: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> Scores:
        """Raises `RewardError` where a part leaves its range."""
        return self.total(self.by_part(problems, completions))

    def by_part(self, problems: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> dict[str, Scores]:
        """Each part's own scores, before its weight. Raises as `score`."""
        parts = {name: reward.score(problems, completions) for name, reward in self._built.items()}
        for name, scores in parts.items():
            check_range(f"the part {name!r}", scores, self._built[name].highest, len(completions))
        return parts

    def total(self, parts: Mapping[str, Scores]) -> Scores:
        weights = [self.parts[name].weight for name in parts]
        sums: Scores = []
        for scores in zip(*parts.values(), strict=True):
            judged = [weight * score for weight, score in zip(weights, scores, strict=True) if score is not None]
            sums.append(sum(judged) if len(judged) == len(weights) else None)
        return sums

    def _most(self, name: str) -> float:
        return self.parts[name].weight * self._built[name].highest

    @cached_property
    def _built(self) -> dict[str, Reward]:
        return {
            name: build(f"part {name!r}: reward", grading.REWARDS, part.reward) for name, part in self.parts.items()
        }
