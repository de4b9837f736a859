"""Which placement is chosen, and that no text makes drafting cost more than it may."""

import pytest

from exact_stubs import StubDrafter, started
from hildanext.core.errors import ConfigError
from hildanext.decoding.exact.costs import undisturbed
from hildanext.decoding.exact.expected import PARENT
from hildanext.decoding.exact.policy import HORIZON, LOSS, ExactConfig, Placing
from hildanext.decoding.exact.row_costs import RowCosts

TABLES = {
    "torch bf16": {1: 26.0, 8: 31.0, 16: 36.0, 32: 47.0},
    "8 bits, two cores": {1: 1.0, 32: 1.0 + 0.105 * 31},
    "8 bits, one core": {1: 1.0, 32: 1.0 + 0.15 * 31},
    "rows as dear as forwards": {1: 1.0, 32: 32.0},
    "rows free": {1: 1.0, 32: 1.0001},
}
SURE = (0.9, 0.8, 0.7)
"""What a card may promise and a text not keep."""


def seconds(table: dict[int, float], length: int, right: bool, drafter: str = "adapters") -> tuple[float, float, int]:
    """By a table of costs: of exact mode, and of the parent alone; and the forwards that were had."""
    costs = RowCosts(table)
    stub = StubDrafter(
        lambda position, _: (position + 1) % (7 if drafter == "ngram" else 60),
        lambda anchor, place: (anchor + 2 + place) % 60 if right else 63,
        3,
    )
    placing = Placing(ExactConfig(drafter=drafter), 3, SURE, costs)  # type: ignore[arg-type]
    state, row = started(stub, placing, [0], length + 1)
    spent, before = 0.0, 0
    while state.rows:
        state.step()
        spent, before = spent + costs(row.rows - before), row.rows
    return spent, costs(1) * length, row.forwards


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("length", [16, HORIZON, 200, 1000])
def test_wrong_drafts_cost_no_more_than_their_share_whatever_the_card_promises(name: str, length: int) -> None:
    ours, parents, forwards = seconds(TABLES[name], length, right=False)
    assert forwards == length, "every draft was wrong"
    assert ours <= parents * (1.0 + LOSS) * (1 + 1e-9) and LOSS <= 0.03


@pytest.mark.parametrize("name", [name for name in TABLES if name != "rows as dear as forwards"])
def test_right_drafts_are_worth_their_rows(name: str) -> None:
    ours, parents, forwards = seconds(TABLES[name], 200, right=True)
    assert forwards < 120 and ours < 0.8 * parents


@pytest.mark.parametrize("name", TABLES)
def test_a_look_up_has_the_same_bound(name: str) -> None:
    """The text repeats itself, so that there is always something to look up, and it is right."""
    ours, parents, _ = seconds(TABLES[name], 100, right=True, drafter="ngram")
    assert ours <= parents * (1.0 + LOSS) * (1 + 1e-9)


def test_what_earlier_texts_have_shown_is_asked_of_no_later_one_at_its_beginning() -> None:
    """Drafts are always wrong, and the card promises nothing: the first text tries, the next ones begin as the
    parent."""
    placing = Placing(ExactConfig(), 3, (0.0, 0.0, 0.0), RowCosts({1: 1.0, 32: 2.0}))
    rows = []
    for _ in range(12):
        stub = StubDrafter(lambda position, _: (position + 1) % 60, lambda anchor, place: 63, 3)
        state, row = started(stub, placing, [0], 41)
        while state.rows:
            state.step()
        rows.append(row.rows)
    assert rows[0] > 40 and rows[-1] == 40
    assert placing.right(row)[0] < 0.05
    eager = Placing(ExactConfig(), 3, (0.0, 0.0, 0.0), RowCosts({1: 1.0, 32: 1.01}))
    for _ in range(50):
        eager.verdict(3, 3)
    assert eager.right(row)[2] > 0.5, "what others have shown counts"


def test_of_several_documents_each_keeps_its_account_by_what_a_shared_forward_costs() -> None:
    costs = RowCosts({1: 1.0, 4: 1.0, 5: 2.0, 32: 12.0})
    placing = Placing(ExactConfig(), 1, (0.6,), costs)
    state, row = started(StubDrafter(lambda at, _: 5, lambda anchor, place: 6, 1), placing, [0], 65)
    assert placing.choose(row, 1).rows == 4, "alone four rows cost no more than one"
    row.placement = None
    assert placing.choose(row, 8) == PARENT, "beside seven others they cost four times as much"
    placing.note(row, 4, 1, 2)
    assert placing.won(row) == pytest.approx(1.0 - costs(8) / costs(2))


def test_with_fixed_rows_their_number_is_chosen_once() -> None:
    costs = RowCosts({1: 1.0, 32: 1.2})
    placing = Placing(ExactConfig(fixed_rows=True), 3, SURE, costs)
    state, row = started(StubDrafter(lambda at, _: 5, lambda anchor, place: 6, 3), placing, [0], 200)
    first = placing.choose(row)
    while state.rows:
        before = row.rows
        state.step()
        assert row.rows - before == first.rows > 1
    dear = Placing(ExactConfig(fixed_rows=True), 3, SURE, RowCosts({1: 1.0, 32: 32.0}))
    assert dear.choose(started(StubDrafter(lambda at, _: 5, lambda *_: 6, 3), dear, [0], 9)[1]) == PARENT


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"sample_drafts": True}, "at temperature 0 draws nothing"),
        ({"sample_drafts": True, "temperature": 0.7}, "another text on another device"),
        ({"sample_drafts": True, "temperature": 0.7, "after": "all", "drafter": "ngram"}, "is about adapters"),
    ],
)
def test_settings_of_sampling_that_do_not_fit_are_refused(knobs: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExactConfig(**knobs)  # type: ignore[arg-type]


def test_a_busy_moment_does_not_make_rows_dear() -> None:
    """One size was disturbed in every turn, another in one: what is larger and was quicker tells what they cost."""
    times = {1: [1.0, 1.1], 2: [1.2, 9.0], 3: [34.0, 40.0], 4: [1.5, 1.4], 9: [1.9, 2.2]}
    assert undisturbed(times) == {1: 1.0, 2: 1.2, 3: 1.4, 4: 1.4, 9: 1.9}
