"""Held-out documents that are trained on, too."""

import logging

import numpy as np
import pytest

from hildanext.data.overlap import count_overlap


def documents(*texts: list[int]) -> list[np.ndarray]:
    return [np.array(text, dtype=np.uint32) for text in texts]


@pytest.mark.parametrize(
    "trained, held_out, count",
    [
        ([[1, 2], [3]], [[4], [3, 3]], 0),
        ([[1, 2], [3]], [[3], [1, 2], [4]], 2),
        ([[1, 2, 3]], [[1, 2]], 0),
        ([[5, 6]], [[5, 6], [5, 6]], 2),
    ],
    ids=["apart", "two of three", "a beginning is another document", "each copy counts"],
)
def test_documents_count_where_all_their_tokens_are_the_same(trained, held_out, count, caplog):
    with caplog.at_level(logging.WARNING, "hildanext"):
        found = count_overlap(documents(*trained), documents(*held_out))
    assert found == {"documents": len(held_out), "trained_on": count}
    assert [record.getMessage().split(" held-out")[0] for record in caplog.records] == (
        [f"{count} of {len(held_out)}"] if count else []
    )
