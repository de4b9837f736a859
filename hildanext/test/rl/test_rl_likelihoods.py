"""What every estimate of log p promises, and the numbers of toys that can be worked out by hand."""

import itertools
import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from conftest import random_model
from hildanext.core.errors import ConfigError
from hildanext.core.registry import build, under_profile
from hildanext.diffusion import block_index
from hildanext.likelihood import LIKELIHOODS
from hildanext.models.lora import LoraConfig, add_lora
from hildanext.rl.batch import RolloutBatch
from hildanext.rl.likelihoods import POLICY_LIKELIHOODS
from hildanext.rl.looks import Look, noised_view, score
from rl_answers import LENGTH, MASK, Toy, by_count, invented, toy_answers, urn

CASES = [
    {"name": "block_elbo", "draws": 2},
    {"name": "mean_field"},
    {"name": "left_to_right"},
    {"name": "trajectory"},
    {"name": "trajectory", "steps": 3},
    {"name": "trajectory", "steps": 2, "chosen": "entropy"},
    {"name": "trajectory", "segments": 2},
]
PAIRS = [
    (case, alignment)
    for case in CASES
    for alignment in ("block", "parent")
    if (case["name"], alignment) != ("left_to_right", "block")
]


def made(section):
    with under_profile("FULL"):
        return build("likelihood", POLICY_LIKELIHOODS, section)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(one: Look, other: Look) -> bool:
    parts = [(getattr(one, part.name), getattr(other, part.name)) for part in fields(Look)]
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in parts)


def test_only_the_bound_is_there_under_safe():
    assert [name for name, member in POLICY_LIKELIHOODS.items() if not member.research] == ["block_elbo"]
    assert [name for name, member in POLICY_LIKELIHOODS.items() if member.of_actions] == ["trajectory"]
    with pytest.raises(ConfigError, match="FULL"):
        build("likelihood", POLICY_LIKELIHOODS, {"name": "mean_field"})
    with pytest.raises(ConfigError, match="draw"):
        build("likelihood", POLICY_LIKELIHOODS, {"name": "block_elbo", "drws": 2})


@pytest.mark.parametrize(("section", "alignment"), PAIRS, ids=str)
def test_a_look_reads_what_it_hides_and_nothing_of_prompt_or_filling(section, alignment):
    batch, card = invented(), random_model("llama", alignment, 4, layers=1).card
    likelihood = made(section)
    looks = likelihood.draw(batch, card, seeded())
    assert looks and len(looks) <= 4
    text = batch.written if likelihood.of_actions else batch.scored
    for look in looks:
        assert look.weight.dtype == torch.float64 and not (look.read & ~look.masked).any()
        assert torch.equal(look.weight != 0, look.read) and (look.weight >= 0).all()
        assert not (look.masked & ~batch.written).any() and not (look.read & ~text).any()
        view = noised_view(batch, look, card.mask_id)
        assert torch.equal(view.noisy == card.mask_id, look.masked)
        if not likelihood.of_actions:
            assert look.masked[batch.after].all(), "what stands behind the text is never shown"
    if section["name"] != "trajectory" or "steps" not in section:
        assert torch.equal(torch.stack([look.read for look in looks]).any(0), text), "every token is read"
    again = likelihood.draw(batch, card, seeded())
    assert all(same(one, other) for one, other in zip(looks, again, strict=True))
    others = likelihood.draw(batch, card, seeded(1))
    noisy = section["name"] == "block_elbo" or "steps" in section
    assert noisy != all(same(one, other) for one, other in zip(looks, others, strict=True))


@pytest.mark.parametrize(("section", "alignment"), PAIRS, ids=str)
def test_rows_may_be_permuted_cut_and_filled_up(section, alignment):
    model, batch = random_model("llama", alignment, 4), invented()
    looks = made(section).draw(batch, model.card, seeded())
    with torch.no_grad():
        whole = score(model, batch, looks)
        chosen = [5, 2, 0, 1]
        part = batch.rows(chosen)
        width = part.tokens.shape[1]
        some = score(model, part, [look.rows(chosen, width) for look in looks])
        wide = score(model, widened(batch, 8), [widened(look, 8) for look in looks])
    assert whole.sequence.shape == (7,) and (whole.sequence < 0).all()
    assert torch.allclose(some.sequence, whole.sequence[chosen], rtol=0, atol=1e-10)
    assert torch.allclose(wide.sequence, whole.sequence, rtol=0, atol=1e-10)
    assert torch.equal(whole.raw != 0, torch.stack([look.read for look in looks]))


def widened(rows, more: int):
    """Filled up on the right."""
    filling = {"document": -1}
    wide = {
        part.name: pad(getattr(rows, part.name), (0, more), value=filling.get(part.name, 0))
        for part in fields(rows)
        if isinstance(getattr(rows, part.name), Tensor) and getattr(rows, part.name).ndim == 2 and part.name != "edits"
    }
    return replace(rows, **wide)


@pytest.mark.parametrize("how", ["fp64", "fp32", "lora", "recomputed", "packed"])
@pytest.mark.parametrize(("section", "alignment"), PAIRS, ids=str)
def test_the_ratio_is_exactly_one_before_the_first_update(section, alignment, how):
    model = random_model("qwen3", alignment, 4, dtype=torch.float64 if how == "fp64" else torch.float32, layers=2)
    if how == "lora":
        add_lora(model, LoraConfig(rank=2, alpha=4.0))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter += 0.1
    batch = invented()
    looks = made(section).draw(batch, model.card, seeded())
    with torch.no_grad():
        old = score(model, batch, looks, packed=how == "packed")
    if how == "recomputed":
        model.recompute_layers()
        model.train()
    now = score(model, batch, looks, packed=how == "packed")
    assert torch.equal(now.raw, old.raw) and now.raw.requires_grad and not old.raw.requires_grad
    assert bool(((now.sequence - old.sequence).exp() == 1.0).all())
    now.sequence.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert max(float(gradient.abs().max()) for gradient in gradients) > 1e-3


def test_looks_at_which_nothing_is_read_cost_no_forward():
    model, batch = random_model("llama", "parent", 4, layers=1), invented()
    (look,) = made({"name": "mean_field"}).draw(batch, model.card, seeded())
    nothing = replace(look, read=torch.zeros_like(look.read), weight=torch.zeros_like(look.weight))
    with torch.no_grad():
        one, two = score(model, batch, [look]), score(model, batch, [look, nothing])
    assert one.columns == two.columns and torch.equal(one.sequence, two.sequence) and not two.raw[1].any()


# The toys. Vectors are those of the literature's formulas, worked out by hand.

TEXTS = list(itertools.product((0, 1), repeat=LENGTH))


def logps(toy: Toy, batch: RolloutBatch, looks: list[Look]) -> Tensor:
    return score(toy, batch, looks).sequence


def every_mask(batch: RolloutBatch) -> list[Look]:
    """The bound by enumeration: k masks of three, k in 0..3, the (4/k)-weighted mean over all choices of them."""
    looks = []
    for k in range(1, LENGTH + 1):
        choices = list(itertools.combinations(range(LENGTH), k))
        for places in choices:
            masked = torch.zeros_like(batch.scored)
            masked[:, [LENGTH + place for place in places]] = True
            looks.append(
                Look(masked, masked, masked.double() * ((LENGTH + 1) / k / (LENGTH + 1) / len(choices)), LENGTH)
            )
    return looks


def test_a_consistent_toy_s_bound_is_exact():
    """V1."""
    batch = toy_answers(TEXTS)
    expected = torch.tensor([-1.386294 if sum(text) in (0, 3) else -2.484907 for text in TEXTS]).double()
    bound = logps(Toy(urn), batch, every_mask(batch))
    assert torch.allclose(bound, expected, atol=1e-6)
    assert float(bound.exp().sum()) == pytest.approx(1.0, abs=1e-9)
    likelihood, generator = made({"name": "block_elbo", "draws": 4}), seeded()
    drawn = torch.stack([logps(Toy(urn), batch, likelihood.draw(batch, Toy(urn).card, generator)) for _ in range(40)])
    off = (drawn.mean(0) - expected).abs()
    assert (off < 3.5 * drawn.std(0) / math.sqrt(40) + 1e-6).all() and float(off.max()) < 0.15


def test_an_inconsistent_toy_s_bound_is_below_the_mixture_of_orders():
    """V2, the orders by `trajectory`."""
    toy, batch = Toy(by_count), toy_answers([(1, 1, 1), (0, 0, 0), (1, 1, 0)])
    bound = logps(toy, batch, every_mask(batch))
    assert bound.tolist() == pytest.approx([-1.155183, -4.199705, -2.170023], abs=1e-6)
    orders = list(itertools.permutations(range(LENGTH)))
    paths = toy_answers([(1, 1, 0)] * 6, orders)
    looks = made({"name": "trajectory"}).draw(paths, toy.card, seeded())
    mixture = float(logps(toy, paths, looks).logsumexp(0)) - math.log(6)
    assert mixture == pytest.approx(-1.822219, abs=1e-6) and float(bound[2]) < mixture


def test_counts_from_zero_and_from_one_have_one_mean():
    """V3: four stratified draws are one of each count, so that the bound of 111 has no noise left."""
    toy, batch = Toy(by_count), toy_answers([(1, 1, 1)])
    for seed in range(4):
        looks = made({"name": "block_elbo", "draws": 4}).draw(batch, toy.card, seeded(seed))
        assert float(logps(toy, batch, looks)) == pytest.approx(-1.155183, abs=1e-6)
    blocks = block_index(batch.document, batch.position, LENGTH)
    other = [
        Look(masked, masked, masked * weight / 3, LENGTH)
        for noising in LIKELIHOODS["count"](draws=3).noisings(batch.scored, blocks, seeded())
        for masked, weight in noising
    ]
    assert float(logps(toy, batch, other)) == pytest.approx(-1.155183, abs=1e-6)


def test_a_coupled_pair_varies_ten_times_less():
    """V4: of each count, alone and with its complement."""
    toy, batch = Toy(by_count), toy_answers([(1, 1, 1)])
    looks = made({"name": "block_elbo", "draws": 4}).draw(batch, toy.card, seeded(3))
    scores = score(toy, batch, looks)
    single = (scores.raw * scores.weight).sum((1, 2)).view(4, 2) * 2 * 4
    order = torch.stack([look.masked.sum() for look in looks[::2]]).argsort()
    first, pair = single[order, 0], single.mean(1)[order]
    assert first.tolist() == pytest.approx([0, -0.421442, -1.426700, -2.772589], abs=1e-6)
    assert pair.tolist() == pytest.approx([-1.386294, -0.924071, -0.924071, -1.386294], abs=1e-6)
    assert float(first.var(correction=0)) == pytest.approx(1.140637, abs=1e-5)
    assert float(pair.var(correction=0)) == pytest.approx(0.053413, abs=1e-5)


def test_a_pair_covers_every_scored_token_once():
    """V5."""
    batch, card = invented(), random_model("llama", "block", 4, layers=1).card
    for seed in range(20):
        looks = made({"name": "block_elbo", "draws": 3}).draw(batch, card, seeded(seed))
        assert len(looks) == 6
        for one, other in zip(looks[::2], looks[1::2], strict=True):
            assert not (one.read & other.read).any() and torch.equal(one.read | other.read, batch.scored)


def test_mean_field_hides_everything_and_is_exact_for_independent_tokens():
    """V12."""
    toy, batch = Toy(by_count), toy_answers([(1, 1, 1)])
    looks = made({"name": "mean_field"}).draw(batch, toy.card, seeded())
    assert float(logps(toy, batch, looks)) == pytest.approx(-2.079442, abs=1e-6)
    product, texts = Toy(lambda zeros, ones: torch.full_like(zeros, 0.7)), toy_answers(TEXTS)
    exact = [sum(math.log(0.7 if token else 0.3) for token in text) for text in TEXTS]
    for section in ({"name": "mean_field"}, {"name": "trajectory"}):
        looks = made(section).draw(texts, toy.card, seeded(1))
        assert logps(product, texts, looks).tolist() == pytest.approx(exact, abs=1e-9)


def test_segments_are_exact_where_each_is_a_step():
    """V13."""
    toy, batch = Toy(by_count), toy_answers([(1, 1, 1)])
    for segments, expected in ((3, -1.155183), (1, -2.079442), (7, -1.155183)):
        looks = made({"name": "trajectory", "segments": segments}).draw(batch, toy.card, seeded())
        assert len(looks) == segments and float(logps(toy, batch, looks)) == pytest.approx(expected, abs=1e-6)
    looks = made({"name": "trajectory", "segments": 2}).draw(batch, toy.card, seeded())
    assert float(logps(toy, batch, looks)) == pytest.approx(math.log(0.5 * 0.7 * 0.7), abs=1e-9)


def test_a_fixed_order_is_a_distribution_and_a_bound_of_one_is_less():
    """V14."""
    batch = toy_answers(TEXTS)
    for law in (urn, by_count):
        toy = Toy(law, 1)
        exact = logps(toy, batch, made({"name": "left_to_right"}).draw(batch, toy.card, seeded()))
        assert float(exact.exp().sum()) == pytest.approx(1.0, abs=1e-9)
        by_steps = made({"name": "trajectory"}).draw(batch, Toy(law).card, seeded())
        assert torch.allclose(exact, logps(Toy(law), batch, by_steps), atol=1e-9)
        bound = logps(Toy(law), batch, every_mask(batch))
        if law is urn:
            assert torch.allclose(exact, bound, atol=1e-9)
        else:
            assert float(bound.exp().sum()) < 0.99


def test_left_to_right_is_one_clean_forward_under_parent_alignment():
    model, batch = random_model("llama", "parent", 4), invented()
    (look,) = made({"name": "left_to_right"}).draw(batch, model.card, seeded())
    with torch.no_grad():
        scores = score(model, batch, [look])
    assert look.block_size == 1 and scores.columns == batch.tokens.numel()
    with pytest.raises(ConfigError, match="alignment 'block' with blocks of 4"):
        made({"name": "left_to_right"}).check(random_model("llama", "block", 4, layers=1).card)
    made({"name": "left_to_right"}).check(random_model("llama", "block", 1, layers=1).card)
    for section in CASES:
        made(section).check(model.card)


def test_the_mask_of_a_toy_is_counted():
    """The toy sees through the attention what it should: three of prompt, and its own block."""
    batch = toy_answers([(1, 0, 1)])
    masked = torch.tensor([[False] * 3 + [True, False, False]])
    look = Look(masked, masked, masked.double(), LENGTH)
    assert noised_view(batch, look, MASK).noisy.tolist() == [[3, 3, 3, 2, 0, 1]]
    assert float(score(Toy(urn), batch, [look]).sequence) == pytest.approx(math.log(0.5))
