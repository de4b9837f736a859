"""Gradients of likelihoods against the exact one: everything that a small policy can do is listed."""

import json
import math
from dataclasses import replace

import pytest
import torch

from hildanext.bench.rl import gradient, gradient_report
from hildanext.bench.rl.drawn_gradients import EXACT, measure_drawn
from hildanext.bench.rl.enumerable import enumerate_policy, flat_gradient, parameters, small_policy
from hildanext.bench.rl.gradient import Bank, RlGradientConfig, SmallPolicyConfig, error_after, moments
from hildanext.core.config import plain
from hildanext.core.errors import ConfigError
from hildanext.core.registry import under_profile
from hildanext.diffusion import NoisedBatch
from hildanext.rl.likelihoods import POLICY_LIKELIHOODS
from hildanext.rl.looks import score
from noised_examples import noisy_logits
from small_models import words_tokenizer

FEW = {
    "block_elbo, 1 draw": {"likelihood": {"name": "block_elbo"}},
    EXACT: {"likelihood": {"name": "trajectory"}},
    "one step": {"likelihood": {"name": "trajectory", "steps": 1}},
    "left_to_right": {"likelihood": {"name": "left_to_right"}},
}


@pytest.fixture(autouse=True)
def full():
    with under_profile("FULL"):
        yield


def settings(**changes):
    small = {"vocab": 2, "block_size": 2, "repeats": 8} | changes.pop("small", {})
    return RlGradientConfig(estimates=FEW, small=small, **changes)


@pytest.mark.parametrize("alignment", ["block", "parent"])
@pytest.mark.parametrize(("block", "per_step", "rows"), [(2, 1, 4 * 2), (3, 1, 8 * 6), (3, 2, 8 * 3), (3, 3, 8)])
def test_chances_of_all_trajectories_sum_to_1(alignment, block, per_step, rows):
    listed = enumerate_policy(small_policy(2, block, alignment, 3), per_step, 3)
    assert len(listed.chance) == rows, "every text, in every division of the block into steps"
    assert float(listed.chance.sum()) == pytest.approx(1.0, abs=1e-12)
    assert listed.value == pytest.approx(float(listed.chance @ listed.reward), abs=1e-15)
    steps = listed.batch.step[:, block:]
    assert int(steps.max()) == math.ceil(block / per_step) - 1


@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_the_chance_of_a_trajectory_is_the_product_of_what_the_model_says_by_the_dense_mask(alignment):
    """Another way to the same number, for a text that is written from the right to the left."""
    model = small_policy(3, 3, alignment, 1)
    listed = enumerate_policy(model, 1, 0)
    wanted = torch.tensor([2, 1, 0])
    row = int((listed.batch.step[:, 3:] == wanted).all(1).nonzero()[7])
    tokens, total = listed.batch.tokens[[row]], 0.0
    for step in range(3):
        masked = torch.zeros_like(tokens, dtype=torch.bool)
        masked[0, 3:] = wanted >= step
        view = NoisedBatch(
            clean=tokens,
            noisy=tokens.masked_fill(masked, model.card.mask_id),
            document=torch.zeros_like(tokens),
            position=torch.arange(6)[None],
            maskable=masked,
            masked=masked,
            replaced=torch.zeros_like(masked),
            time=torch.ones(1, 6),
            block_size=3,
        )
        law = noisy_logits(model, view)[0].detach().masked_fill(model.banned, float("-inf")).log_softmax(-1)
        place = 5 - step
        total += float(law[place, tokens[0, place]])
        here = law[place][~model.banned]
        assert float(listed.batch.entropy[row, place]) == pytest.approx(float(-(here.exp() * here).sum()), abs=1e-9)
        assert float(listed.batch.logp[row, place]) == pytest.approx(float(law[place, tokens[0, place]]), abs=1e-9)
    assert float(listed.chance[row]) == pytest.approx(math.exp(total) / 6, rel=1e-9)


def test_the_exact_gradient_is_that_of_finite_differences():
    model = small_policy(2, 2, "parent", 5)
    listed = enumerate_policy(model, 1, 5)
    direction = torch.randn(len(listed.gradient), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = []
    with torch.no_grad():
        for sign in (1.0, -2.0):
            at = 0
            for one in parameters(model):
                one += sign * 1e-5 * direction[at : at + one.numel()].view_as(one)
                at += one.numel()
            with torch.enable_grad():
                values.append(enumerate_policy(model, 1, 5).value)
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(listed.gradient @ direction), rel=1e-6)


def test_the_bank_has_the_gradients_of_single_tokens():
    model = small_policy(3, 2, "parent", 2)
    listed = enumerate_policy(model, 1, 2)
    looks = POLICY_LIKELIHOODS["mean_field"]().draw(listed.batch, model.card, torch.Generator())
    bank = Bank(model)
    numbers = [number for _, number in bank.numbers(listed.batch, looks[0], 9)]
    whole = flat_gradient(score(model, listed.batch, looks).sequence[9], parameters(model))
    torch.testing.assert_close(bank.matrix()[numbers].sum(0), whole, rtol=1e-9, atol=1e-12)


def test_only_the_trajectory_of_all_steps_is_exact_and_drawn_steps_scatter_more():
    rows = gradient.measure_small(settings(small={"vocab": 3}))["estimates"]
    assert rows[EXACT]["bias_as_is"] < 1e-10 and rows[EXACT]["bias_error"] == 0.0
    assert rows[EXACT]["cosine"] == pytest.approx(1.0)
    assert rows["one step"]["bias_as_is"] < 5 * rows["one step"]["bias_error"], "no bias but what draws leave"
    assert rows["one step"]["variance_as_is"] > rows[EXACT]["variance_as_is"]
    assert rows["left_to_right"]["bias"] > 1e-3, "the law of another order"
    assert rows["block_elbo, 1 draw"]["bias_error"] > 0.0
    assert rows[EXACT]["columns"] == 2 * rows["one step"]["columns"], "a forward for each step"


def test_a_likelihood_that_refuses_the_small_policy_is_named():
    small = {"alignment": "block"}
    rows = gradient.measure_small(settings(small=small))["estimates"]
    assert "block" in rows["left_to_right"]["refused"] and "refused" not in rows[EXACT]


def test_moments_by_hand():
    """Two draws, (3, 1) and (1, 1), of a gradient (1, 0): mean (2, 1), noise of the mean 1, squared norm 5 - 1."""
    said = moments(torch.tensor([[3.0, 1.0], [1.0, 1.0]]).double(), 20.0, torch.tensor([1.0, 0.0]).double())
    assert said["scale"] == pytest.approx(2 / 4)
    assert said["cosine"] == pytest.approx(1.0), "2 over 2"
    assert said["bias"] == pytest.approx(0.0), "(1, 0.5) is 0.25 off, which the noise of 0.25 explains"
    assert said["bias_as_is"] == pytest.approx(1.0), "(2, 1) is 2 off, squared, and the noise 1 of that"
    assert said["variance_as_is"] == pytest.approx(16.0) and said["variance"] == pytest.approx(4.0)
    assert said["bias_error"] == pytest.approx(0.5)


def test_error_falls_with_columns_to_the_bias():
    row = {"bias": 0.3, "variance": 4.0, "columns": 10.0}
    assert error_after(row, 1000.0) == pytest.approx(math.sqrt(0.09 + 0.04))
    assert error_after(row, 1e12) == pytest.approx(0.3)


def test_on_a_real_model_what_has_no_noise_is_its_own_mean(make_model, tmp_path):
    model = make_model("qwen3", "parent", dtype=torch.float32, layers=1)
    rollouts = {"name": "engine", "max_new_tokens": 6, "slots": 4}
    asked = settings(
        draws=3, singles=2, asked=2, group=2, rollouts=rollouts, problems={"name": "arithmetic", "count": 20}
    )
    drawn = measure_drawn(model, words_tokenizer(), asked, "FULL")
    rows = drawn["estimates"]
    assert drawn["answers"] == 4 and drawn["tokens"] > 0
    assert rows[EXACT]["draws"] == 1 and rows[EXACT]["cosine"] == pytest.approx(1.0)
    assert rows[EXACT]["noise"] == pytest.approx(0.0, abs=1e-12)
    assert rows["block_elbo, 1 draw"]["draws"] == 3 and rows["block_elbo, 1 draw"]["noise"] > 0
    assert rows["one step"]["cosine_to_trajectory"] > 0
    assert "refused" not in rows["left_to_right"], "alignment parent"
    result = {
        "model": "m",
        "settings": {"small": plain(SmallPolicyConfig()), "singles": 2},
        "machine": drawn["machine"],
        "small": gradient.measure_small(settings()),
        "drawn": drawn,
    }
    assert json.loads(json.dumps(result))
    text = gradient_report.markdown(result)
    assert all(name in text for name in FEW) and "Gradient of E[r] over 8 trajectories" in text
    assert len(gradient_report.tables(result)) == 2 and len(gradient_report.tables({**result, "drawn": None})) == 1
    assert gradient_report.draw(result, tmp_path / "a.png").stat().st_size > 10_000


def test_research_likelihoods_need_the_profile_full():
    with under_profile("SAFE"), pytest.raises(ConfigError, match="FULL"):
        RlGradientConfig()
    with under_profile("SAFE"):
        RlGradientConfig(estimates={"espo": {"likelihood": {"name": "block_elbo"}}})


def test_no_estimates_are_refused():
    with pytest.raises(ConfigError, match="no estimates"):
        replace(settings(), estimates={})
