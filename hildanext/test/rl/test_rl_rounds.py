"""A round's micro-batches: looks of several groups side by side, and actions of edited answers replayed in company."""

import torch

from hildanext.rl.looks import Look
from hildanext.rl.rounds import side_by_side
from rl_answers import toy_answers


def look(rows: int, width: int, shown: torch.Tensor | None = None) -> Look:
    masked = torch.zeros(rows, width, dtype=torch.bool)
    masked[:, -1] = True
    return Look(masked, masked, masked.double(), 4, shown, None)


def test_a_group_that_shows_other_tokens_keeps_them_beside_one_that_does_not():
    batch = toy_answers([(1, 0, 1), (0, 0, 1), (1, 1, 1)])
    shown = torch.full((2, 6), 7)
    both = side_by_side([[look(1, 6)], [look(2, 6, shown)]], [1, 2], batch)
    assert len(both) == 1 and both[0].labels is None
    assert torch.equal(both[0].shown[:1], batch.tokens[:1]) and torch.equal(both[0].shown[1:], shown)


def test_a_group_with_fewer_looks_has_nothing_in_the_last_ones_and_rows_are_filled_up():
    batch = toy_answers([(1, 0, 1), (0, 0, 1), (1, 1, 1)])
    looks = side_by_side([[look(1, 3), look(1, 3)], [look(2, 6)]], [1, 2], batch)
    assert len(looks) == 2 and all(one.shown is None for one in looks)
    assert looks[0].masked.sum() == 3 and looks[0].masked[0, 2] and looks[0].masked[1, 5]
    assert looks[1].masked.sum() == 1 and not looks[1].read[1:].any() and (looks[1].weight[1:] == 0).all()
