"""What a reward is: numbers in a declared range for answers to one problem each, or no number at all."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar


class Reward:
    """Judges answers by rule. Members are frozen knobs.

    A problem is one row of the data set, as it was read. Nothing is below 0.
    """

    highest: ClassVar[float] = 1.0
    """What no answer exceeds, whatever the knobs. A promise that tests hold members to; nothing scales by it."""

    def score(self, problems: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> list[float | None]:
        """One number in [0, highest] for each completion, in order; `None` where it could not be judged.

        An answer that could not be judged is left out of its group: it is neither rewarded nor punished.
        Raises `DataError` where a problem lacks what the rule needs.
        """
        raise NotImplementedError
