"""How sure a score is: Wilson's interval, the bootstrap, and paired comparisons. Everything is 95 %, two-sided."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z = 1.959963984540054
"""The 97.5 % point of the normal distribution."""
RESAMPLES = 2000
PART = 1 << 22
"""Indices drawn at once, so that memory does not grow with the number of items."""


class Interval(NamedTuple):
    low: float
    high: float


class Values(NamedTuple):
    """One entry per item: a mean is sum(value) / sum(weight)."""

    values: np.ndarray
    weights: np.ndarray

    @property
    def mean(self) -> float:
        """NaN where there is nothing to divide by."""
        weight = float(self.weights.sum())
        return float(self.values.sum()) / weight if weight > 0 else math.nan

    @property
    def is_proportion(self) -> bool:
        """Every item counts once and is right or wrong."""
        return bool((self.weights == 1).all() and np.isin(self.values, (0.0, 1.0)).all())


def interval(values: Values, seed: int = 0) -> Interval:
    """Wilson's interval for right or wrong, the bootstrap's otherwise; (NaN, NaN) without items."""
    if len(values.values) == 0:
        return Interval(math.nan, math.nan)
    if values.is_proportion:
        return wilson(int(values.values.sum()), len(values.values))
    return bootstrap(values, seed)


def wilson(successes: int, trials: int) -> Interval:
    """Wilson's score interval of a proportion; inside [0, 1] and never empty at 0 or all (Wilson 1927)."""
    if trials == 0:
        return Interval(math.nan, math.nan)
    share = successes / trials
    shrink = 1.0 / (1.0 + Z * Z / trials)
    centre = share + Z * Z / (2 * trials)
    spread = Z * math.sqrt(share * (1 - share) / trials + Z * Z / (4 * trials * trials))
    return Interval(max(0.0, shrink * (centre - spread)), min(1.0, shrink * (centre + spread)))


def bootstrap(values: Values, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Percentile bootstrap of sum(value) / sum(weight) over items."""
    return _percentiles(_resampled([values], seed, resamples)[0])


def paired_bootstrap(ours: Values, theirs: Values, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Percentile bootstrap of the difference of two means over the same items, drawn together."""
    one, other = _resampled([ours, theirs], seed, resamples)
    return _percentiles(one - other)


def crossed_interval(ours: Values, theirs: Values | None = None, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Percentile bootstrap of a table's sum(value) / sum(weight), or of its difference from that of another one.

    The parts of `Values` have the shape [seeds items]. Seeds and items are both drawn anew, each seed with all the
    drawn items; a table of one seed (what is greedy) stands beside every seed of the other. With one seed in both it is
    the bootstrap over items, and says nothing of other seeds. Source: Owen, "The pigeonhole bootstrap", Annals of
    Applied Statistics 2007, which is conservative.
    """
    parts = [ours] if theirs is None else [ours, theirs]
    rows, columns = np.broadcast_shapes(*(part.values.shape for part in parts))
    generator = np.random.default_rng(seed)
    by_row = generator.multinomial(rows, np.full(rows, 1 / rows), size=resamples).astype(float)
    by_column = generator.multinomial(columns, np.full(columns, 1 / columns), size=resamples).astype(float)
    means = []
    for part in parts:
        values, weights = (np.broadcast_to(table, (rows, columns)).astype(float) for table in part)
        weight = (by_row @ weights * by_column).sum(-1)
        means.append((by_row @ values * by_column).sum(-1) / np.where(weight > 0, weight, np.nan))
    return _percentiles(means[0] if theirs is None else means[0] - means[1])


def paired_interval(ours: Values, theirs: Values, seed: int = 0) -> Interval:
    """Of the difference of two means over the same items: Agresti and Min's for right or wrong, else the bootstrap.

    Agresti and Min (2005) add half an item to each of the four cells, so that few disagreements do not look like
    certainty, as they do to the bootstrap.
    """
    if not (ours.is_proportion and theirs.is_proportion):
        return paired_bootstrap(ours, theirs, seed)
    only_here = float((ours.values > theirs.values).sum()) + 0.5
    only_there = float((theirs.values > ours.values).sum()) + 0.5
    count = len(ours.values) + 2.0
    difference = (only_here - only_there) / count
    spread = Z * math.sqrt((only_here + only_there) / count - difference**2) / math.sqrt(count)
    return Interval(max(-1.0, difference - spread), min(1.0, difference + spread))


def mcnemar(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Exact two-sided p of "both are right equally often", from the items on which they differ (McNemar 1947).

    With b items right here only and c there only, the smaller of them is compared with Binomial(b + c, 1/2).
    """
    only_here = sum(a > b for a, b in zip(ours, theirs, strict=True))
    only_there = sum(b > a for a, b in zip(ours, theirs, strict=True))
    differing, fewer = only_here + only_there, min(only_here, only_there)
    tail = sum(math.comb(differing, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**differing)


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Chance that at least one of k draws, without replacement, from the samples passes.

    Unbiased for the chance with k fresh samples (Chen et al., arXiv:2107.03374). Raises `ValueError` for k > samples.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples")
    if samples - passed < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - passed + 1, samples + 1))


def _resampled(parts: Sequence[Values], seed: int, resamples: int) -> list[np.ndarray]:
    """Means of each part over resampled items, the same draw for all parts; shape [resamples] each."""
    count = len(parts[0].values)
    generator = np.random.default_rng(seed)
    means: list[list[np.ndarray]] = [[] for _ in parts]
    step = max(1, PART // max(count, 1))
    for start in range(0, resamples, step):
        index = generator.integers(count, size=(min(step, resamples - start), count))
        for column, part in zip(means, parts, strict=True):
            weights = part.weights[index].sum(-1)
            column.append(part.values[index].sum(-1) / np.where(weights > 0, weights, np.nan))
    return [np.concatenate(column) for column in means]


def _percentiles(means: np.ndarray) -> Interval:
    low, high = np.nanpercentile(means, (2.5, 97.5))
    return Interval(float(low), float(high))
