"""Corruption, weights and readout: the forward process."""

from dataclasses import replace

import pytest
import torch

from hildanext.diffusion import (
    CausalPairs,
    block_index,
    block_times,
    complement,
    effect_rates,
    elbo_weight,
    mask_always,
    mask_tokens,
    next_turn,
    replace_tokens,
    targets,
)

MASK = 61


def view_of(length: int = 64, batch: int = 8, block: int = 8, seed: int = 0, t: float | None = None, prompt: int = 3):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, MASK, (batch, length), generator=generator)
    document = torch.zeros_like(tokens)
    document[:, -5:] = -1
    position = torch.arange(length).repeat(batch, 1).masked_fill(document < 0, 0)
    maskable = (position >= prompt) & (document >= 0)
    blocks = block_index(document, position, block)
    time = block_times(blocks, (0.05, 1.0), generator) if t is None else torch.full(blocks.shape, t)
    return mask_tokens(tokens, document, position, maskable, time, block, MASK, generator), generator


def test_prompt_and_padding_are_never_masked():
    view, _ = view_of(t=1.0)
    assert torch.equal(view.masked, view.maskable)
    assert torch.equal(view.noisy[~view.maskable], view.clean[~view.maskable])


def test_blocks_share_one_noise_level_and_levels_are_stratified():
    view, _ = view_of()
    blocks = block_index(view.document, view.position, 8)
    levels = [view.time[blocks == number] for number in range(int(blocks.max()) + 1)]
    assert all(bool((level == level[0]).all()) for level in levels)
    drawn = torch.tensor([float(level[0]) for level in levels]).sort().values
    edges = torch.linspace(0.05, 1.0, len(drawn) + 1)
    assert bool(((drawn >= edges[:-1]) & (drawn <= edges[1:])).all())


def test_a_block_s_level_says_nothing_of_its_place_in_the_batch():
    """Strata are shuffled: in order, early blocks would always be almost clean and late ones almost masked."""
    generator, count = torch.Generator().manual_seed(0), 16
    blocks = torch.arange(count)[None]
    levels = torch.cat([block_times(blocks, (0.05, 1.0), generator) for _ in range(200)]).double()
    place = torch.arange(count).expand_as(levels).double()
    correlation = float(torch.corrcoef(torch.stack([place.flatten(), levels.flatten()]))[0, 1])
    assert abs(correlation) < 0.06, "four standard deviations of 3,200 independent pairs are 0.07"
    assert (levels.mean(0) - 0.525).abs().max() < 0.1


def test_levels_need_not_be_stratified():
    drawn = [block_times(torch.arange(8)[None], (0.0, 1.0), torch.Generator().manual_seed(s), False) for s in range(20)]
    counts = [len(set((levels * 8).long()[0].tolist())) for levels in drawn]
    assert max(counts) < 8 or len(set(counts)) > 1


def test_block_index_starts_anew_with_each_document():
    document = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 0, 0, 0, 0, 0]])
    position = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    assert block_index(document, position, 2).tolist() == [[0, 0, 1, 2, 2, 3], [4, 4, 5, 5, 6, 6]]


def test_complementary_views_cover_each_maskable_token_once():
    view, _ = view_of()
    other = complement(view, MASK)
    assert not bool((view.masked & other.masked).any())
    assert torch.equal(view.masked | other.masked, view.maskable)
    assert torch.allclose(other.time, (1 - view.time).clamp_min(1e-3))


def test_replaced_tokens_are_wrong_real_and_not_masked():
    view, generator = view_of(length=256, batch=64, t=0.3)
    real = torch.arange(5, 50)
    noisy = replace_tokens(view, 0.2, real, generator)
    assert not bool((noisy.replaced & noisy.masked).any())
    assert bool((noisy.replaced <= noisy.maskable).all())
    changed = noisy.noisy[noisy.replaced]
    assert bool((changed != noisy.clean[noisy.replaced]).all())
    assert int(changed.min()) >= 5 and int(changed.max()) < 50


def test_replacement_rate_within_three_sigma():
    view, generator = view_of(length=1024, batch=100, t=1e-6, prompt=0)
    rate, count = 0.1, int(view.kept.sum())
    assert count > 1e5
    hit = int(replace_tokens(view, rate, torch.arange(61), generator).replaced.sum())
    assert abs(hit - rate * count) < 3 * (count * rate * (1 - rate)) ** 0.5


def test_nothing_to_replace_is_no_error():
    view, generator = view_of(prompt=10_000)
    assert not bool(replace_tokens(view, 0.5, torch.arange(61), generator).replaced.any())


@pytest.mark.parametrize("complementary", [False, True])
def test_a_token_s_chance_is_uniform_whatever_the_view_shows_of_it(complementary: bool):
    views = [view_of(seed=seed, prompt=0)[0] for seed in range(40)]
    views = [complement(view, MASK) for view in views] if complementary else views
    for masked in (False, True):
        drawn = torch.cat([view.chance[view.maskable & (view.masked == masked)] for view in views])
        assert 0.0 <= float(drawn.min()) and float(drawn.max()) < 1.0
        counts = torch.histc(drawn, 10, 0.0, 1.0)
        expected = len(drawn) / 10
        assert float(((counts - expected) ** 2 / expected).sum()) < 27.9, "chi-square, 9 degrees of freedom, p = 0.001"


@pytest.mark.parametrize("t", [1e-6, 1.0])
def test_a_chance_is_a_number_at_the_ends_of_time(t: float):
    view, _ = view_of(t=t)
    assert bool(((view.chance >= 0) & (view.chance < 1)).all())


def test_the_other_half_has_the_other_noise_level_and_hides_no_wrong_token():
    view, generator = view_of(t=0.3)
    view = replace_tokens(view, 0.5, torch.arange(61), generator)
    other = complement(view, MASK)
    assert torch.allclose(other.time, torch.full_like(other.time, 0.7)) and not bool(other.replaced.any())
    assert torch.equal(other.noisy[~other.masked], view.clean[~other.masked])


def test_effects_are_replaced_as_often_as_their_boost_says():
    view, _ = view_of(t=1e-6)
    pairs = CausalPairs.collate([[(20, 10, 1.0)]] * 8)
    rates = effect_rates(replace(view, pairs=pairs), 0.1, 4.0)
    assert rates[:, 20].tolist() == pytest.approx([0.4] * 8) and rates[:, 21].tolist() == pytest.approx([0.1] * 8)
    assert float(effect_rates(view, 0.1, 4.0).max()) == pytest.approx(0.1)


def test_hidden_tokens_are_masks_that_nobody_fills():
    view, _ = view_of(t=0.5)
    hidden = view.document < 0
    shown = mask_always(view, hidden, MASK)
    assert bool((shown.noisy[hidden] == MASK).all()) and torch.equal(shown.masked, view.masked)


def test_elbo_weight_is_one_over_t_at_masks_alone():
    view, _ = view_of(t=0.25)
    weight = elbo_weight(view)
    assert bool((weight[view.masked] == 4.0).all()) and bool((weight[~view.masked] == 0).all())


def test_a_turn_keeps_the_truth_as_its_label():
    view, _ = view_of(t=0.5)
    draft = view.noisy.clone()
    draft[view.masked] = 7
    following = next_turn(view, draft, MASK)
    assert torch.equal(following.clean, view.clean)
    assert not bool(following.masked.any())
    assert torch.equal(following.replaced, view.maskable & (draft != view.clean))
    still = draft.clone()
    still[:, 8:24] = MASK
    following = next_turn(view, still, MASK)
    assert torch.equal(following.masked, view.maskable & (still == MASK)) and bool(following.masked.any())
    assert not bool((following.masked & following.replaced).any())
    assert torch.equal(following.noisy[~view.maskable], view.noisy[~view.maskable]), "a prompt is not drafted"


def test_left_shift_never_predicts_the_first_token_of_a_document():
    position = torch.tensor([[0, 1, 2, 0, 1]])
    maskable = torch.ones(1, 5, dtype=torch.bool)
    assert targets(maskable, position, "left").tolist() == [[False, True, True, False, True]]
    assert targets(maskable, position, "none").all()
