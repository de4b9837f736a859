"""Thresholds are strict, ends are counted to the forward: the comparisons of threshold editing one by one."""

import pytest
import torch

from hildanext.decoding import Canvas, ThresholdEdit
from hildanext.decoding.base import Edit, most_confident

MASK, VOCAB = 9, 10


def canvas(tokens: list[int], fixed: tuple[int, ...] = (), checks: int = 0) -> Canvas:
    row = torch.tensor([tokens])
    prompt = torch.zeros_like(row, dtype=torch.bool)
    prompt[0, list(fixed)] = True
    return Canvas(row, row == MASK, prompt, torch.zeros(row.shape), torch.tensor([checks]))


def logits_of(*candidates: tuple[int, float]) -> torch.Tensor:
    """Rows whose best id is given with its probability; the rest is spread over the other ids but the mask."""
    rows = []
    for token, p in candidates:
        row = torch.full((VOCAB,), (1 - p) / (VOCAB - 2), dtype=torch.float64)
        row[token], row[MASK] = p, 0.0
        rows.append(row.log())
    return torch.stack(rows)


def step(decoder: ThresholdEdit, before: Canvas, *candidates: tuple[int, float]) -> Edit:
    where = decoder.needs(before)
    chosen = [candidate for candidate, needed in zip(candidates, where[0].tolist(), strict=True) if needed]
    return decoder.edit(logits_of(*chosen), where, before)


def at(confidence: float) -> float:
    """The confidence that a candidate of this probability gets in the end, rounding included."""
    decoder = ThresholdEdit(tau_edit=0.0)
    return float(step(decoder, canvas([1]), (2, confidence)).confidence[0, 0])


@pytest.mark.parametrize("p", [0.4, 0.75, 1.0])
def test_an_edit_needs_more_than_tau_edit(p: float):
    exactly = at(p)
    before = canvas([1, 2])
    assert step(ThresholdEdit(tau_edit=exactly), before, (3, p), (2, p)).write.tolist() == [[False, False]]
    below = ThresholdEdit(tau_edit=exactly - 1e-9)
    assert step(below, before, (3, p), (2, p)).write.tolist() == [[True, False]], "the same token is no edit"


def test_a_fill_needs_more_than_tau_mask():
    exactly = at(0.75)
    before, sure = canvas([MASK, MASK]), ((1, 0.9), (2, 0.75))
    assert step(ThresholdEdit(tau_mask=exactly), before, *sure).write.tolist() == [[True, False]]
    assert step(ThresholdEdit(tau_mask=exactly - 1e-9), before, *sure).write.tolist() == [[True, True]]


def test_a_prompt_inside_the_block_is_not_edited():
    decoder = ThresholdEdit(tau_edit=0.0)
    assert step(decoder, canvas([1, 2], fixed=(0,)), (3, 0.9), (3, 0.9)).write.tolist() == [[False, True]]
    offered = decoder.edit(logits_of((3, 0.9), (3, 0.9)), torch.ones(1, 2, dtype=torch.bool), canvas([1, 2], (0,)))
    assert offered.write.tolist() == [[False, True]], "nor where its logits are there too"


def test_the_fallback_fills_one_mask_where_none_is_sure_and_leaves_the_written_alone():
    edit = step(ThresholdEdit(tau_mask=0.95, tau_edit=None), canvas([1, MASK, MASK]), (1, 1.0), (2, 0.5), (2, 0.5))
    assert edit.write.tolist() == [[False, True, False]], "ties to the lowest position"
    confidence = torch.tensor([[0.9, 0.2, 0.2]])
    assert most_confident(confidence, torch.tensor([[False, True, True]])).tolist() == [[False, True, False]]
    assert not most_confident(confidence, torch.zeros(1, 3, dtype=torch.bool)).any()


@pytest.mark.parametrize(("checks", "final"), [(0, False), (1, False), (2, True)])
def test_a_block_ends_with_the_last_of_its_checks(checks: int, final: bool):
    """`max_post` 3: this forward is check number `checks` + 1; an edit would otherwise keep the block open."""
    decoder = ThresholdEdit(tau_edit=0.0, max_post=3)
    edit = step(decoder, canvas([1, 2], checks=checks), (3, 0.9), (2, 0.9))
    assert edit.write.any() and bool(edit.final[0]) == final
    safe = ThresholdEdit(tau_edit=0.0, max_post=3, kv_safe=True)
    assert not bool(step(safe, canvas([1, 2], checks=checks), (3, 0.9), (2, 0.9)).final[0])


def test_the_safe_ending_confirms_once_the_budget_is_spent():
    safe = ThresholdEdit(tau_edit=0.0, max_post=3, kv_safe=True)
    spent = step(safe, canvas([1, 2], checks=3), (3, 0.9), (2, 0.9))
    assert not spent.write.any() and bool(spent.final[0])


def test_a_forward_that_changes_nothing_ends_a_block_and_one_that_fills_does_not():
    decoder = ThresholdEdit(tau_edit=0.5, max_post=3)
    assert bool(step(decoder, canvas([1, 2]), (1, 0.9), (2, 0.9)).final[0])
    assert not bool(step(decoder, canvas([1, MASK]), (1, 0.9), (2, 0.9)).final[0])


def test_no_budget_ends_a_block_with_its_last_fill():
    decoder = ThresholdEdit(tau_edit=0.5, max_post=0)
    assert bool(step(decoder, canvas([1, MASK]), (1, 0.9), (2, 0.9)).final[0])
    assert not bool(step(decoder, canvas([MASK, MASK]), (1, 0.9), (2, 0.1)).final[0])


@pytest.mark.parametrize(
    ("sure", "filled"),
    [
        ((0.9, 0.7), [True, True]),  # m 0.8, threshold 0.58
        ((0.9, 0.55), [True, False]),  # m 0.725, threshold 0.61
        ((0.72, 0.18), [True, False]),  # m 0.45, threshold 0.72: nothing is above it, the best is filled
    ],
)
def test_the_cautious_threshold_falls_with_the_mean_of_the_masks_alone(sure: tuple[float, float], filled: list[bool]):
    """0.9 + m (0.5 - 0.9); the written token, of which the model is sure, has no part in m."""
    decoder = ThresholdEdit(tau_mask=0.5, tau_cautious=0.9, tau_edit=1.0)
    edit = step(decoder, canvas([1, MASK, MASK]), (1, 1.0), (2, sure[0]), (3, sure[1]))
    assert edit.write.tolist() == [[False, *filled]]
