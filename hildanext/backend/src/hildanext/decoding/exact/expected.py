"""What a way to place masks gives, from the chances that drafts are right: tokens per forward, and rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations


@dataclass(frozen=True)
class Placement:
    """`drafts` tokens are verified in a forward; groups of as many masks stand behind the acceptance points `points`,
    each a number of drafts that may come to be accepted. Without drafts a forward is the parent's own."""

    drafts: int
    points: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows of a forward with drafts."""
        return 1 + self.drafts + len(self.points) * self.drafts

    @property
    def rows_without(self) -> int:
        """Rows of a forward that has no drafts to verify: the certain token and one group."""
        return 1 + self.drafts


PARENT = Placement(0, ())


def last_point(drafts: int) -> Placement:
    """Masks behind the last draft alone."""
    return Placement(drafts, (drafts,))


def all_points(drafts: int) -> Placement:
    """Masks behind every acceptance point."""
    return Placement(drafts, tuple(range(drafts + 1)))


def share_with_drafts(placement: Placement, right: Sequence[float]) -> float:
    """The chance that a forward leaves drafts to the next one; `right[j - 1]` is the chance that j drafts are right."""
    reached = [1.0, *right[: placement.drafts], 0.0]
    return sum(reached[point] - reached[point + 1] for point in placement.points)


def tokens_per_forward(placement: Placement, right: Sequence[float]) -> float:
    """The mean over a long text. A run of forwards with drafts is followed by one without, which writes one token."""
    if placement.drafts == 0:
        return 1.0
    per_forward = 1.0 + sum(right[: placement.drafts])
    goes_on = share_with_drafts(placement, right)
    if goes_on >= 1.0 - 1e-12:
        return per_forward
    run = 1.0 / (1.0 - goes_on)
    return (per_forward * run + 1.0) / (run + 1.0)


def seconds_per_forward(placement: Placement, right: Sequence[float], cost: Callable[[int], float]) -> float:
    """The mean over a long text, where a forward of n rows takes cost(n)."""
    if placement.drafts == 0:
        return cost(1)
    goes_on = share_with_drafts(placement, right)
    if goes_on >= 1.0 - 1e-12:
        return cost(placement.rows)
    run = 1.0 / (1.0 - goes_on)
    return (cost(placement.rows) * run + cost(placement.rows_without)) / (run + 1.0)


def placements(most: int) -> list[Placement]:
    """None, and every set of points for every number of drafts up to `most` (up to 3; beyond, all or the last)."""
    chosen = [PARENT]
    for drafts in range(1, most + 1):
        if drafts > 3:
            chosen += [last_point(drafts), all_points(drafts)]
            continue
        every = range(drafts + 1)
        sets = (points for count in range(1, drafts + 2) for points in combinations(every, count))
        chosen += [Placement(drafts, points) for points in sets]
    return chosen


def looked_up(most: int) -> list[Placement]:
    """None, and every number of drafts that come from elsewhere: there are no masks."""
    return [PARENT, *(Placement(drafts, ()) for drafts in range(1, most + 1))]


def fastest(
    most: int,
    right: Sequence[float],
    cost: Callable[[int], float],
    may: Callable[[Placement], bool] | None = None,
    masks: bool = True,
) -> Placement:
    """The placement with the most tokens a second, of those that `may` be chosen. The first of equal ones, the parent
    alone before all. Without `masks`, of forwards that a look-up has found drafts for."""

    def speed(placement: Placement) -> float:
        if not masks:
            return (1.0 + sum(right[: placement.drafts])) / cost(1 + placement.drafts)
        return tokens_per_forward(placement, right) / seconds_per_forward(placement, right, cost)

    every = (placements if masks else looked_up)(min(most, len(right)))
    return max((placement for placement in every if may is None or may(placement)), key=speed)
