"""What rows cost is learnt from the steps that are made: by an artificial machine whose costs are not the table's."""

import random
from collections.abc import Callable

import pytest

from exact_stubs import StubDrafter, started
from hildanext.decoding.exact.costs import CALM, PATIENCE, REPEATS, in_turns
from hildanext.decoding.exact.expected import PARENT
from hildanext.decoding.exact.policy import LOSS, ExactConfig, Placing
from hildanext.decoding.exact.row_costs import CHEAPEST, DOUBT, ENOUGH, FORGOTTEN, STALE, TRIED, RowCosts, RunningCosts
from hildanext.decoding.exact.state import ExactRow

DEAR = RowCosts({1: 30.0, 3: 45.0, 9: 61.0, 16: 89.0})
CHEAP = RowCosts({1: 24.0, 3: 26.0, 9: 33.0, 16: 48.0})
TEXT = (0.5, 0.25, 0.12)
"""The chances that so many drafts are right: worth their rows where these are cheap, and not where they are dear."""


class Row:
    """What `Placing` looks at of an `ExactRow`."""

    def __init__(self, limit: int) -> None:
        self.prompt, self.limit, self.tokens = 1, limit, [0]
        self.forwards, self.trials, self.won = 0, 0, 0.0
        self.offered, self.confirmed, self.unpaid = [], [], {}
        self.placement, self.drafts = None, 0


Slow = Callable[[int], float]
"""By how much a forward is slower than the machine is when it is quiet."""


def written(
    placing: Placing, machine: RowCosts, length: int, right: tuple[float, ...] = TEXT, slow: Slow = lambda _: 1.0
) -> tuple[float, list[int]]:
    """What a text took beside the parent alone under the same slowness, and the rows of each forward."""
    row, chance = Row(length + 1), random.Random(0)
    spent, fed = 0.0, []
    while len(row.tokens) < row.limit:
        placement = placing.choose(row)  # type: ignore[arg-type]
        given = min(row.drafts, placement.drafts)
        points = [point for point in placement.points if point <= given] if given else placement.points[:1]
        accepted, height = 0, chance.random()
        while accepted < given and height < right[accepted]:
            accepted += 1
        rows = 1 + given + len(points) * placement.drafts
        row.forwards += 1
        ExactRow.count(row, given, accepted)  # type: ignore[arg-type]
        placing.verdict(given, accepted)
        row.drafts = placement.drafts if accepted in points or (not given and points) else 0
        row.tokens += [0] * (accepted + 1)
        placing.took(1, rows, machine(rows) * slow(len(fed)))
        placing.note(row, rows, accepted + 1)  # type: ignore[arg-type]
        spent += machine(rows)
        fed.append(rows)
    return spent / (machine(1) * (len(row.tokens) - 1)), fed


def following(table: RowCosts, card: tuple[float, ...] = TEXT, **knobs: object) -> Placing:
    return Placing(ExactConfig(**knobs), 3, card, RunningCosts(table))  # type: ignore[arg-type]


def test_rows_that_the_table_says_are_dear_are_found_to_be_cheap() -> None:
    by_table = Placing(ExactConfig(), 3, TEXT, DEAR)
    assert written(by_table, CHEAP, 300)[0] > 0.97, "by the table alone it does not pay, or this says nothing"
    placing = following(DEAR)
    took, fed = written(placing, CHEAP, 300)
    assert took < 0.85
    assert sum(rows > 1 for rows in fed[96:144]) > 40, "within some dozens of forwards"
    assert placing.costs is not None and placing.costs.price(9) == pytest.approx(CHEAP.price(9), rel=0.06)


def test_rows_that_the_table_says_are_cheap_are_found_to_be_dear() -> None:
    by_table = Placing(ExactConfig(), 3, TEXT, CHEAP)
    assert written(by_table, DEAR, 600)[0] > 1.0 + LOSS, "by the table alone it loses, or this says nothing"
    placing = following(CHEAP)
    took, fed = written(placing, DEAR, 600)
    assert took <= 1.07, "what sizes cost is learnt by feeding them"
    assert sum(rows == 1 for rows in fed[96:144]) > 30
    assert written(placing, DEAR, 600)[0] <= 1.0 + LOSS, "and known then"


@pytest.mark.parametrize(("table", "machine"), [(DEAR, CHEAP), (CHEAP, DEAR), (CHEAP, CHEAP), (DEAR, DEAR)])
@pytest.mark.parametrize("length", [64, 150])
@pytest.mark.parametrize("card", [TEXT, (0.9, 0.8, 0.7)])
def test_wrong_drafts_cost_no_more_than_their_share(
    table: RowCosts, machine: RowCosts, length: int, card: tuple[float, ...]
) -> None:
    """What is not known costs two and a half forwards at most in a process's first text and half a one in the next, in
    the time of a machine whose prices are within `DOUBT` of the table's."""
    assert all(machine.price(rows) <= DOUBT * table.price(rows) for rows in range(17)[1:]), "or no account could know"
    placing = following(table, card)
    for trials in (2.5, 0.5):
        assert written(placing, machine, length, right=(0.0, 0.0, 0.0))[0] <= 1.0 + LOSS + trials / length


@pytest.mark.parametrize("at", [*range(7), 12, 20, 33])
def test_a_disturbed_step_moves_nothing(at: int) -> None:
    """One step that takes fifty times as long, wherever it comes."""
    placing = following(CHEAP)
    took, _ = written(placing, CHEAP, 200, slow=lambda step: 50.0 if step == at else 1.0)
    assert took < 0.95
    assert placing.costs is not None
    for rows in (2, 4, 9, 16):
        assert placing.costs.price(rows) == pytest.approx(CHEAP.price(rows), rel=0.02)


def test_a_machine_that_slows_down_makes_no_rows_dear() -> None:
    """Sizes that are not seen go with those that are."""
    placing = following(CHEAP)
    written(placing, CHEAP, 200, slow=lambda step: 3.0 if step > 100 else 1.0)
    costs = placing.costs
    assert isinstance(costs, RunningCosts)
    assert costs.pace == pytest.approx(3.0)
    for rows in (2, 4, 9, 16):
        assert costs.price(rows) == pytest.approx(CHEAP.price(rows), rel=0.02)


def test_a_size_that_nobody_has_seen_goes_by_its_neighbours() -> None:
    costs = RunningCosts(RowCosts({1: 10.0, 32: 41.0}))
    for _ in range(ENOUGH):
        costs.note(1, 1, 10.0)
    assert not costs.knows(4) and costs.least(4) < costs.price(4) < costs.most(4)
    for _ in range(TRIED):
        costs.note(1, 4, 26.0)  # twice what the table says
    assert costs.price(4) == pytest.approx(2.6) and costs.knows(4) and costs.knows(5) and not costs.knows(16)
    assert costs.price(16) == pytest.approx(5.0), "two and a half by the table"
    assert costs.price(4, 8) == pytest.approx(2.0 * 41.0 / 17.0), "of more documents too, until they are seen"


def test_what_was_seen_too_seldom_is_reckoned_with_and_not_believed() -> None:
    costs = RunningCosts(RowCosts({1: 10.0, 32: 41.0}))
    for _ in range(ENOUGH):
        costs.note(1, 1, 10.0)
    for _ in range(TRIED - 1):
        costs.note(1, 4, 15.0)
    assert not costs.knows(4) and costs.price(4) == pytest.approx(1.3) and costs.most(4) == pytest.approx(1.5)
    costs.note(1, 4, 15.0)
    assert costs.price(4) == costs.most(4) == costs.least(4) == pytest.approx(1.5)


def test_no_quick_moment_makes_drafts_that_are_wrong_a_gain() -> None:
    costs = RunningCosts(RowCosts({1: 10.0, 32: 41.0}))
    for _ in range(ENOUGH):
        costs.note(1, 1, 10.0)
    for _ in range(TRIED):
        costs.note(1, 4, 1.0)
    assert costs.price(4) == pytest.approx(1.0 + CHEAPEST * 0.3)


def test_the_parent_is_looked_at_first_and_again_and_what_was_seen_long_ago_is_asked_anew() -> None:
    placing = following(CHEAP)
    _, fed = written(placing, CHEAP, 600)
    assert fed[:ENOUGH] == [1] * ENOUGH and fed[ENOUGH] > 1
    assert 0 < sum(rows == 1 for rows in fed[ENOUGH:]) <= 600 / STALE
    costs = placing.costs
    assert costs is not None and costs.knows(9)
    for _ in range(FORGOTTEN + 1):
        costs.note(1, 1, 24.0)
    assert not costs.knows(9)


def test_with_fixed_rows_costs_are_the_tables_whatever_was_seen() -> None:
    """Their number decides what the parent computes: no text is to depend on earlier ones."""
    placing = following(DEAR, fixed_rows=True)
    assert placing.costs is DEAR
    assert written(placing, CHEAP, 100)[1] == [1] * 100


def test_a_step_tells_what_it_took_and_not_what_others_did_with_it() -> None:
    """By a clock that each forward and each look at a step moves."""
    now = 0.0

    def parent(position: int, token: int) -> int:
        nonlocal now
        now += 1.0
        return 5

    def look(step: object) -> None:
        nonlocal now
        now += 1000.0

    class Noting(RunningCosts):
        noted: list[tuple[int, int, float]] = []

        def note(self, documents: int, rows: int, seconds: float) -> None:
            self.noted.append((documents, rows, seconds))

    placing = Placing(ExactConfig(drafter="ngram"), 3, (), Noting(RowCosts({1: 1.0, 32: 1.0001})))
    state, row = started(StubDrafter(parent, lambda anchor, place: 6, 3), placing, [5], 9, None, look, lambda: now)
    other = state.row([5], 9, 0, 1)
    state.prefill(other)
    state.step()
    assert Noting.noted == [(2, 2, 2.0)], "the parent's own rows first, one of each document"
    assert placing.choose(row, 2) == PARENT


def test_sizes_take_turns_until_none_becomes_quicker() -> None:
    calls = 0

    def turn_of(seconds: Callable[[int], float]) -> dict[int, list[float]]:
        nonlocal calls
        calls = 0

        def turn() -> list[tuple[int, float]]:
            nonlocal calls
            calls += 1
            return [(1, seconds(calls)), (9, 2 * seconds(calls))]

        return in_turns(turn)

    assert [len(times) for times in turn_of(lambda _: 0.001).values()] == [REPEATS] * 2
    turn_of(lambda call: 0.03 * 0.97 ** min(call, 12))
    assert calls == 12 + CALM, "it was quiet at last"
    assert sum(sum(times) for times in turn_of(lambda call: 0.1 * 0.97**call).values()) < PATIENCE + 0.5
    turn_of(lambda call: 9.0 * 0.9**call)
    assert calls == REPEATS, "never fewer, however long they take"
