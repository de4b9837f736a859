"""What placements of masks give: the published table, and a simulation that draws its acceptances."""

import pytest
import torch

from exact_stubs import Always, StubDrafter, started
from hildanext.decoding.exact.expected import (
    PARENT,
    Placement,
    all_points,
    fastest,
    last_point,
    seconds_per_forward,
    tokens_per_forward,
)

RIGHT = (0.655, 0.366, 0.19, 0.087)


@pytest.mark.parametrize(
    ("placement", "tokens", "rows"),
    [
        (last_point(1), 1.487, (3, 2)),
        (all_points(1), 1.655, (4, 2)),
        (Placement(2, (0, 1)), 1.747, (7, 3)),
        (all_points(2), 2.021, (9, 3)),
        (last_point(3), 1.669, (7, 4)),
        (Placement(3, (0, 1)), 1.887, (10, 4)),
        (all_points(3), 2.211, (16, 4)),
        (all_points(4), 2.298, (25, 5)),
    ],
)
def test_tokens_and_rows_of_a_placement_are_those_of_the_table(
    placement: Placement, tokens: float, rows: tuple[int, int]
) -> None:
    """EX-5."""
    assert tokens_per_forward(placement, RIGHT) == pytest.approx(tokens, abs=5e-4)
    assert (placement.rows, placement.rows_without) == rows


@pytest.mark.parametrize("placement", [all_points(2), Placement(2, (0, 1)), last_point(3), all_points(3)], ids=str)
def test_a_simulation_with_drawn_acceptances_writes_as_many_tokens_a_forward(placement: Placement) -> None:
    """EX-5."""
    length, generator = 3000, torch.Generator().manual_seed(1)
    chance = torch.rand(length + 40, generator=generator).tolist()

    def draft(anchor: int, place: int) -> int:
        # Mask `place` behind an anchor speaks of the position anchor + 2 + place, whose token the parent gives there.
        return (anchor + 2 + place) % 60 if chance[anchor] < RIGHT[place] else 63

    drafter = StubDrafter(lambda position, _: (position + 1) % 60, draft, placement.drafts)
    state, row = started(drafter, Always(placement), [0], length)
    while state.rows:
        state.step()
    assert row.tokens[:length] == [at % 60 for at in range(length)]
    assert length / row.forwards == pytest.approx(tokens_per_forward(placement, RIGHT), rel=0.03)


def test_the_fastest_placement_depends_on_what_rows_cost() -> None:
    free = fastest(4, RIGHT, lambda rows: 1.0)
    assert free == all_points(4)
    narrow = fastest(4, RIGHT, lambda rows: 1.0 + 0.105 * (rows - 1))
    assert narrow == all_points(1)
    assert seconds_per_forward(narrow, RIGHT, lambda rows: 1.0 + 0.105 * (rows - 1)) < 1.655 / 1.25
    assert fastest(4, RIGHT, float) == PARENT
    assert fastest(4, (0.0, 0.0), lambda rows: 1.0 + 0.01 * rows) == PARENT
