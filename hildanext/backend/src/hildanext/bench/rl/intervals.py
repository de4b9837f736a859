"""How sure a gain is that was measured on the same problems under several seeds."""

import numpy as np
from jaxtyping import Float

from hildanext.core.statistics import RESAMPLES, Interval

POOLED = "seeds and held-out problems are both drawn anew, each seed with all the drawn problems (crossed bootstrap)"


def crossed_bootstrap(
    gains: Float[np.ndarray, "seeds problems"], seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """95 % percentile interval of the mean of a table whose rows and columns are both samples.

    With one seed it is the bootstrap over problems, and says nothing of other seeds; with three, that of seeds is
    coarse. Source: Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 2007, which is conservative.
    """
    generator = np.random.default_rng(seed)
    rows, columns = gains.shape
    means = np.empty(resamples)
    for number in range(resamples):
        drawn = gains[generator.integers(rows, size=rows)].mean(0)
        means[number] = drawn[generator.integers(columns, size=columns)].mean()
    low, high = np.percentile(means, (2.5, 97.5))
    return Interval(float(low), float(high))
