"""Held-out documents that are trained on, too: counted by the hash of their tokens."""

import hashlib
import logging
from collections.abc import Iterable

import numpy as np

logger = logging.getLogger(__name__)


def count_overlap(trained: Iterable[np.ndarray], held_out: Iterable[np.ndarray]) -> dict[str, int]:
    """How many held-out `documents` there are, and how many of them are `trained_on`, token by token the same.

    A warning says so. It is no error: large corpora hold copies. 200 million tokens in a million documents take
    2 seconds of one core.
    """
    held = [(len(tokens), _hash(tokens)) for tokens in held_out]
    lengths, seen = {length for length, _ in held}, set()
    wanted = {digest for _, digest in held}
    for tokens in trained:
        if len(tokens) in lengths and (digest := _hash(tokens)) in wanted:
            seen.add(digest)
    count = sum(digest in seen for _, digest in held)
    if count:
        logger.warning(
            "%s of %s held-out documents are trained on, too: what is measured on them flatters. Hold out others.",
            f"{count:,}",
            f"{len(held):,}",
        )
    return {"documents": len(held), "trained_on": count}


def _hash(tokens: np.ndarray) -> bytes:
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
