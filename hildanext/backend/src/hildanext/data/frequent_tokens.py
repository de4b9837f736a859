"""The tokens that a text is most likely to need, when not all of a vocabulary can be looked at."""

from collections.abc import Iterable

import numpy as np


def frequent_tokens(documents: Iterable[np.ndarray], count: int, vocabulary: int) -> list[int]:
    """Ids of the `count` most frequent tokens of `documents`, in ascending order. Behind those that occur come the
    smallest ids: tokenizers made by merging number frequent tokens first."""
    seen = np.zeros(vocabulary, np.int64)
    for document in documents:
        ids, often = np.unique(document, return_counts=True)
        known = ids < vocabulary
        seen[ids[known]] += often[known]
    return sorted(np.argsort(-seen, kind="stable")[:count].tolist())
