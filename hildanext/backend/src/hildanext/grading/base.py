"""What a reward is: numbers in a declared range for answers to one problem each, or no number at all."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from hildanext.core.errors import RewardError

Scores = list[float | None]
"""One for each answer, in order; `None` where an answer could not be judged."""

_ROUNDING = 1e-9


class Reward:
    """Judges answers by rule. Members are frozen knobs.

    A problem is one row of the data set, as it was read. Nothing is below 0.
    """

    form_only: ClassVar[bool] = False
    """Whether it looks at an answer's form alone and never at what it says."""

    @property
    def highest(self) -> float:
        """What no answer exceeds under these knobs: scores lie in [0, highest], which `checked_scores` checks."""
        return 1.0

    def check(self, problem: Mapping[str, Any]) -> None:
        """Raises `DataError` where a problem lacks what the rule needs, and names it."""
        raise NotImplementedError

    def score(self, problems: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> Scores:
        """One number in [0, highest] for each completion, in order; `None` where it could not be judged.

        An answer that could not be judged is left out of its group: it is neither rewarded nor punished.
        Raises `DataError` where a problem lacks what the rule needs.
        """
        raise NotImplementedError

    def by_part(self, problems: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> dict[str, Scores]:
        """The scores of each part by its name, from which `total` makes the score; one part, unless it is a sum."""
        return {"reward": self.score(problems, completions)}

    def total(self, parts: Mapping[str, Scores]) -> Scores:
        """The score of each answer, of what `by_part` gave."""
        return parts["reward"]


def checked_scores(
    reward: Reward, problems: Sequence[Mapping[str, Any]], completions: Sequence[str]
) -> tuple[Scores, dict[str, Scores]]:
    """The scores and their parts, each answer judged once.

    Raises `RewardError` where there is not one score for each answer, and for one that is no finite number or lies
    outside [0, highest].
    """
    if len(problems) != len(completions):
        raise RewardError(f"{len(completions)} answers to {len(problems)} problems", "give one problem for each answer")
    parts = reward.by_part(problems, completions)
    scores = reward.total(parts)
    check_range(type(reward).__name__, scores, reward.highest, len(completions))
    return scores, parts


def check_range(name: str, scores: Sequence[float | None], highest: float, count: int) -> None:
    """Raises `RewardError` as `checked_scores` does; `name` is the reward's in it."""
    if len(scores) != count:
        raise RewardError(f"{name} gave {len(scores)} scores for {count} answers", "return one for each, or None")
    for index, score in enumerate(scores):
        if score is None:
            continue
        if not math.isfinite(score):
            raise RewardError(f"{name} gave {score} for answer {index}", "return a finite number, or None")
        if not 0 <= score <= highest + _ROUNDING:
            raise RewardError(
                f"{name} gave {score} for answer {index}, outside its range [0, {highest:g}]",
                "mend the reward, or the range that it declares",
            )
