"""Which drafts stay, and what stands behind them."""

import itertools

import pytest
import torch
from torch import Tensor

from hildanext.decoding.exact.verify import verify_greedy, verify_sampled


def judged(
    p: list[list[float]], drafts: list[int], accept: list[float], draw: list[float], q: Tensor | None = None
) -> tuple[int, int]:
    law = torch.tensor(p, dtype=torch.float64)[None]
    given = torch.ones(1, len(drafts), dtype=torch.bool)
    verdict = verify_sampled(
        law, torch.tensor([drafts]), given, q, torch.tensor([accept], dtype=torch.float64),
        torch.tensor([draw], dtype=torch.float64),
    )  # fmt: skip
    return int(verdict.accepted), int(verdict.token)


def test_the_longest_run_of_right_drafts_stays_and_the_parents_token_stands_behind_it() -> None:
    best = torch.tensor([[5, 6, 7], [5, 6, 7], [5, 6, 7]])
    drafts = torch.tensor([[5, 6], [5, 9], [9, 6]])
    verdict = verify_greedy(best, drafts, torch.ones(3, 2, dtype=torch.bool))
    assert verdict.accepted.tolist() == [2, 1, 0]
    assert verdict.token.tolist() == [7, 6, 5]


def test_a_draft_that_was_not_given_is_never_kept_even_where_it_would_be_right() -> None:
    verdict = verify_greedy(torch.tensor([[5, 6]]), torch.tensor([[5]]), torch.tensor([[False]]))
    assert (int(verdict.accepted), int(verdict.token)) == (0, 5)


@pytest.mark.parametrize(("draft", "accept", "expected"), [(0, 0.999, (1, 0)), (1, 0.499, (1, 0)), (1, 0.501, (0, 0))])
def test_a_sampled_draft_stays_with_the_chance_p_over_q(draft: int, accept: float, expected: tuple[int, int]) -> None:
    """EX-3: p = (.7, .3), q = (.4, .6)."""
    q = torch.tensor([[[0.4, 0.6]]], dtype=torch.float64)
    assert judged([[0.7, 0.3], [1.0, 0.0]], [draft], [accept], [0.999, 0.0], q) == expected


def test_a_greedy_draft_stays_with_the_parents_chance_and_else_the_rest_is_drawn_from() -> None:
    """EX-4: p(d) = .2; the rest is p without d, renormalised."""
    p = [[0.2, 0.6, 0.2], [1.0, 0.0, 0.0]]
    assert judged(p, [0], [0.199], [0.0, 0.0]) == (1, 0)
    assert judged(p, [0], [0.201], [0.0, 0.0]) == (0, 1)
    assert judged(p, [0], [0.201], [0.749, 0.0]) == (0, 1)
    assert judged(p, [0], [0.201], [0.751, 0.0]) == (0, 2)


def cells(edges: list[Tensor]) -> list[tuple[float, float]]:
    """Middle and width of each stretch between edges."""
    cuts = torch.cat([torch.tensor([0.0, 1.0], dtype=torch.float64), *edges]).clamp(0.0, 1.0).unique().tolist()
    return [((low + high) / 2, high - low) for low, high in itertools.pairwise(cuts)]


@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "greedy"])
def test_the_law_of_three_tokens_is_the_parents_by_enumeration(sampled: bool) -> None:
    """EX-9: a vocabulary of 4 without its least likely token (a nucleus), two drafts; every cell of the uniform numbers
    is visited once."""
    generator = torch.Generator().manual_seed(3)

    def nucleus() -> Tensor:
        p = (3.0 * torch.rand(4, dtype=torch.float64, generator=generator)).softmax(-1)
        p[p.argmin()] = 0.0
        return p / p.sum()

    contexts = [context for length in range(3) for context in itertools.product(range(4), repeat=length)]
    parent = {context: nucleus() for context in contexts}
    drafter = {context: nucleus() for context in contexts}
    written: dict[tuple[int, ...], float] = {}
    for first, second in itertools.product(range(4), repeat=2):
        q = torch.stack([drafter[()], drafter[(first,)]])
        chosen = (first == int(q[0].argmax()), second == int(q[1].argmax()))
        weight = float(q[0, first] * q[1, second]) if sampled else float(all(chosen))
        if weight == 0.0:
            continue
        law = torch.stack([parent[()], parent[(first,)], parent[(first, second)]])
        drafts = torch.tensor([first, second])
        of_draft = q if sampled else torch.nn.functional.one_hot(drafts, 4).double()
        ratio = law[[0, 1], drafts] / of_draft[[0, 1], drafts]
        rests = [(p - minus).clamp_min(0.0) for p in law for minus in (torch.zeros(4), *of_draft)]
        edges = [rest.cumsum(-1) / rest.sum() for rest in rests if float(rest.sum()) > 0]
        grid = list(itertools.product(cells([ratio[:1]]), cells([ratio[1:]]), cells(edges)))
        count = len(grid)
        verdict = verify_sampled(
            law.expand(count, -1, -1), drafts.expand(count, -1), torch.ones(count, 2, dtype=torch.bool),
            q.expand(count, -1, -1) if sampled else None,
            torch.tensor([[one[0], two[0]] for one, two, _ in grid], dtype=torch.float64),
            torch.tensor([[third[0]] * 3 for *_, third in grid], dtype=torch.float64),
        )  # fmt: skip
        for at, (one, two, third) in enumerate(grid):
            kept = (*drafts[: int(verdict.accepted[at])].tolist(), int(verdict.token[at]))
            written[kept] = written.get(kept, 0.0) + weight * one[1] * two[1] * third[1]
    for text in itertools.product(range(4), repeat=3):
        chances = [float(parent[text[:at]][text[at]]) for at in range(3)]
        wanted = chances[0] * chances[1] * chances[2]
        # What a forward did not write is the next one's, which begins with the parent's own law.
        got = sum(written.get(text[:n], 0.0) * torch.tensor(chances[n:]).prod().item() for n in (1, 2, 3))
        assert got == pytest.approx(wanted, abs=1e-7), text
