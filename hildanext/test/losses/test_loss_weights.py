"""What each loss weighs, token by token: no model, no forward."""

import pytest
import torch
from test_losses import MASK, make_view

from hildanext.losses.base import mean_over
from hildanext.losses.distillation import ParentDistillation
from hildanext.losses.mask_to_token import MaskToToken
from hildanext.losses.objective import _draft
from hildanext.losses.representation import RepresentationAlignment
from hildanext.losses.token_to_token import TokenToToken


def test_a_draft_fills_what_is_above_a_drawn_threshold_and_leaves_the_rest():
    """Thresholds are uniform in 0.3 to 0.9; a visible token is drafted whatever its confidence."""
    view = make_view(t=0.9, batch=4)
    where = view.maskable.nonzero(as_tuple=True)
    predicted = torch.full((len(where[0]),), 7)
    shares = {}
    for confidence in (0.29, 0.6, 0.91):
        sure = torch.full((len(where[0]),), confidence)
        drafts = [_draft(view, where, predicted, sure, torch.Generator().manual_seed(seed)) for seed in range(60)]
        assert all(bool((draft[~view.masked] == 7).all()) for draft in drafts)
        filled = [draft[view.masked] != MASK for draft in drafts]
        assert all(bool(row.all()) or not bool(row.any()) for row in filled), "one threshold a draft"
        shares[confidence] = sum(bool(row.any()) for row in filled) / 60
    assert shares[0.29] == 0 and shares[0.91] == 1 and 0.25 < shares[0.6] < 0.75


@pytest.mark.parametrize("loss", [ParentDistillation(), ParentDistillation(elbo=False), RepresentationAlignment()])
def test_the_parent_has_no_say_about_a_document_s_first_token(loss):
    """It never predicts it. Under block alignment that token is masked and predicted like the others."""
    view = make_view(t=1.0, documents=[0] * 8 + [1] * 8)
    weights = loss.weights(view, torch.ones_like(view.masked))
    weight = next(part for part in weights.parts if part is not None)
    assert bool(view.masked.all()) and torch.equal(weight > 0, view.position > 0)


@pytest.mark.parametrize(("elbo", "weight"), [(True, 0.5 / 0.4), (False, 0.5)])
def test_distillation_weighs_masks_as_the_elbo_does_or_all_alike(elbo, weight):
    view = make_view(t=0.4)
    divergence = ParentDistillation(elbo=elbo).weights(view, view.maskable).divergence
    assert divergence[view.masked & (view.position > 0)].tolist() == pytest.approx(
        [weight] * int(divergence.count_nonzero())
    )
    assert not bool(divergence[~view.masked].any())


def test_a_mean_is_over_the_targets_among_the_chosen():
    """Weights that a sum over 6 targets, divided by 6, makes the mean over the 2 chosen targets."""
    targets = torch.tensor([[True] * 6 + [False] * 2])
    chosen = torch.tensor([[True, True] + [False] * 4 + [True, True]])
    weights = mean_over(chosen, targets)
    assert weights.tolist() == [[3.0, 3.0, 0, 0, 0, 0, 0, 0]]
    assert not mean_over(torch.zeros_like(chosen), targets).any()


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_kept_token_that_carries_the_loss_stands_for_the_others(share):
    view = make_view(t=0.2, batch=64)
    weight = TokenToToken(weight=0.0, keep=0.6, keep_share=share).weights(view, view.maskable).cross_entropy
    carried = weight[weight > 0]
    assert len(carried) and carried.tolist() == pytest.approx([0.6 / share] * len(carried))
    assert float(weight.sum()) == pytest.approx(0.6 * int(view.kept.sum()), rel=0.2)


def test_mask_losses_weigh_masks_alone():
    view = make_view(t=0.5)
    weight = MaskToToken(weight=3.0).weights(view, view.maskable).cross_entropy
    assert torch.equal(weight > 0, view.masked) and set(weight[view.masked].tolist()) == {6.0}
