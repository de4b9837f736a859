"""What every estimator promises: rows' log p, gradients, and noise that can be had again. Tiny fp64 models."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck

from hildanext.core.errors import ConfigError, UnknownChoice
from hildanext.core.registry import build
from hildanext.data.batch import Batch
from hildanext.diffusion import block_index
from hildanext.likelihood import LIKELIHOODS
from hildanext.likelihood.base import noised_view, scored_tokens, weighted_losses
from hildanext.likelihood.held_out import LikelihoodConfig, bound, exact
from hildanext.losses import SupervisedStep
from hildanext.losses.linear_cross_entropy import linear_cross_entropy
from hildanext.losses.linear_log_probs import linear_log_probs
from hildanext.losses.mask_to_token import MaskToToken

EOS = 1
NAMES = ["count", "time", "coupled", "exact"]


@pytest.fixture
def batch() -> Batch:
    """A document of 12 tokens and two of 6; what is first in each is given."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(2, 60, (2, 12), generator=generator)
    document = torch.tensor([[0] * 12, [0] * 6 + [1] * 6])
    position = torch.tensor([list(range(12)), [*range(6), *range(6)]])
    return Batch(tokens, document, position, position > 0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_table_holds_what_the_configuration_names():
    assert set(NAMES) == set(LIKELIHOODS)
    for name in ("count", "time", "coupled"):
        assert type(LikelihoodConfig(estimator=name, draws=7).at(4)) is LIKELIHOODS[name]
        assert LikelihoodConfig(estimator=name).at(1) == LIKELIHOODS["exact"]()
    for name in ("exact", "counts"):  # an exact number is no bound at the larger block sizes
        with pytest.raises(UnknownChoice, match="estimator"):
            LikelihoodConfig(estimator=name)
    with pytest.raises(ConfigError, match="block_size"):
        build("likelihood", LIKELIHOODS, {"name": "exact", "block_size": 4})


@pytest.mark.parametrize("name", NAMES)
def test_scores_add_up_to_the_bound_of_the_text(make_model, batch, name):
    model = make_model("llama", "parent")
    likelihood = LIKELIHOODS["exact"]() if name == "exact" else LIKELIHOODS[name](draws=3, block_size=4)
    scores = likelihood.score(model, batch, seeded(5)).detach()
    if name == "exact":
        whole = exact(model, [batch], EOS)
    else:
        whole = bound(model, [batch], 4, EOS, LikelihoodConfig(estimator=name, draws=3, seed=5))
    assert scores.shape == (2,) and (scores < 0).all()
    assert -float(scores.sum()) == pytest.approx(whole.real_nll + whole.padding_nll, abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_another_policy_can_be_shown_the_same_noise(make_model, batch, name):
    """Kept or drawn again from the seed: before the first update the ratio is 1 exactly, after it is not."""
    model = make_model("qwen3", "block")
    policy = copy.deepcopy(model)
    likelihood = LIKELIHOODS[name]()
    noise = likelihood.draw(model, batch, seeded(1))
    first = likelihood.score_under(policy, batch, noise)
    assert torch.equal(first, likelihood.score_under(model, batch, noise))
    assert torch.equal(first, likelihood.score(model, batch, seeded(1)))
    if name != "exact":
        assert not torch.equal(first, likelihood.score(model, batch, seeded(2)))
    first.sum().backward()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 1e-3 * parameter.grad if parameter.grad is not None else 0.0
        assert float(likelihood.score_under(policy, batch, noise).sum()) > float(first.detach().sum())


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_the_training_loss_on_the_same_views(make_model, batch, name):
    model, likelihood = make_model("llama", "parent"), LIKELIHOODS[name]()
    noise = likelihood.draw(model, batch, seeded())
    weight = model.causal_lm.model.layers[0].mlp.down_proj.weight
    likelihood.score_under(model, batch, noise).sum().backward()
    ours, weight.grad = weight.grad.clone(), None
    step = SupervisedStep(model, {"m2t": MaskToToken()})
    for noising in noise:
        for masked, factor in noising:
            view = noised_view(batch, masked, factor, likelihood.size(model), model.card.mask_id)
            (step(view).total / (len(noising) * len(noise))).backward()
    assert torch.allclose(ours, -weight.grad, atol=1e-6) and float(ours.abs().max()) > 1e-3


def test_a_gradient_may_come_from_one_row_alone(make_model, batch):
    model, likelihood = make_model("llama", "parent"), LIKELIHOODS["exact"]()
    weight = model.causal_lm.model.layers[0].mlp.down_proj.weight
    likelihood.score(model, batch, seeded())[1].backward()
    ours, weight.grad = weight.grad.clone(), None
    alone = Batch(*(part[1:] for part in (batch.tokens, batch.document, batch.position, batch.maskable)))
    likelihood.score(model, alone, seeded()).sum().backward()
    assert torch.allclose(ours, weight.grad, atol=1e-6) and float(ours.abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["count", "time", "coupled"])
def test_levels_are_shared_out_among_a_block_s_draws_and_tell_nothing_of_its_place(batch, name):
    """Over 200 drawings: each block sees all four quarters, and its first draw any of them."""
    scored, blocks = scored_tokens(batch), block_index(batch.document, batch.position, 4)
    levels = []
    likelihood = LIKELIHOODS[name](draws=4)

    class Noted(type(likelihood)):
        def noising(self, scored, blocks, level, generator):
            levels.append(level)
            return super().noising(scored, blocks, level, generator)

    noted, generator = Noted(draws=4), seeded()
    for _ in range(200):
        list(noted.noisings(scored, blocks, generator))
    quarters = (torch.stack(levels).view(200, 4, -1) * 4).long()
    assert (quarters.sort(1).values == torch.arange(4)[:, None]).all()
    assert 1.2 < float(quarters[:, 0].double().mean()) < 1.8
    assert (quarters[:, 0] != quarters[:, 0, :1]).any(), "every block has the level of the first"


def test_hidden_tokens_are_shown_as_masks_and_not_scored(make_model, batch):
    hidden = torch.zeros_like(batch.maskable)
    hidden[:, 10:] = True
    batch = replace(batch, maskable=batch.maskable & ~hidden, always_masked=hidden)
    model = make_model()
    for noising in LIKELIHOODS["coupled"](block_size=4).draw(model, batch, seeded()):
        for masked, weight in noising:
            view = noised_view(batch, masked, weight, 4, model.card.mask_id)
            assert (view.noisy[hidden] == model.card.mask_id).all() and not (view.masked & hidden).any()
        assert not weighted_losses(model, batch, noising, 4).nll[hidden].any()


@pytest.mark.parametrize("chunk", [2, 5, 64])
def test_log_probabilities_of_the_head_and_their_gradient(chunk):
    generator = seeded()
    hidden = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    labels, banned = torch.tensor([0, 1, 2, 3, 0]), torch.arange(7) == 6
    log_probs = linear_log_probs(hidden, head, labels, banned, chunk)
    ones = torch.ones(5, dtype=torch.float64)
    losses = linear_cross_entropy(hidden, head, labels, ones, banned)
    assert torch.allclose(-log_probs, losses.cross_entropy, atol=1e-12)
    assert gradcheck(lambda states, matrix: linear_log_probs(states, matrix, labels, banned, chunk), (hidden, head))


def test_no_masks_are_no_forward(make_model, batch):
    nothing = torch.zeros_like(batch.maskable)
    draw = weighted_losses(make_model(), batch, [(nothing, torch.ones(nothing.shape))], 4)
    assert draw.forwards == 0 and not draw.nll.any()
