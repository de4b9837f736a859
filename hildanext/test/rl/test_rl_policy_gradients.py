"""Objectives against what can be computed by hand: REINFORCE on small models, and policies that are enumerated."""

import math
from dataclasses import replace
from itertools import combinations, product

import pytest
import torch

from conftest import random_model
from hildanext.core.registry import build, under_profile
from hildanext.rl.advantages import ADVANTAGES
from hildanext.rl.batch import Answer, RolloutBatch, collate
from hildanext.rl.looks import Look, Scores, score
from hildanext.rl.objectives import OBJECTIVES
from hildanext.rl.objectives.base import PolicyInputs
from hildanext.rl.objectives.ratios import ratios
from hildanext.rl.objectives.spg import upper_bound

GROUP = torch.tensor([0, 0, 0, 1, 1, 1])
ADVANTAGE = torch.tensor([0.5, -1.0, 0.5, 2.0, -0.75, -1.25], dtype=torch.float64)


def objective(name: str, **knobs):
    with under_profile("FULL"):
        return build("objective", OBJECTIVES, {"name": name, **knobs})


def advantage(name: str, rewards: torch.Tensor) -> torch.Tensor:
    with under_profile("FULL"):
        return build("advantage", ADVANTAGES, {"name": name}).of(rewards, torch.ones(rewards.shape, dtype=torch.bool))


def inputs(now: Scores, advantage: torch.Tensor, old: Scores | None = None, reference: Scores | None = None):
    """One group, all valid; `old` is `now` unless given."""
    rows = len(advantage)
    old = now.detach() if old is None else old
    valid, group = torch.ones(rows, dtype=torch.bool), torch.zeros(rows, dtype=torch.long)
    return PolicyInputs(now, old, reference, advantage, valid, group)


def of_tokens(*rows: list[float], weight: list[list[float]] | None = None) -> Scores:
    """One look at answers of the given log-probabilities, filled up with what is not read."""
    width = max(len(row) for row in rows)
    raw = torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=torch.float64)[None]
    read = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    weights = read.double() if weight is None else torch.tensor(weight, dtype=torch.float64)
    return Scores(raw.requires_grad_(), weights[None], read.sum(-1))


def slope(member, given: PolicyInputs) -> list[list[float]]:
    """The gradient in the first look's log-probabilities, by row."""
    (gradient,) = torch.autograd.grad(member.loss(given)[0], given.now.raw)
    return gradient[0].tolist()


# On a model


def answers() -> RolloutBatch:
    """Six answers of 5 to 8 tokens to two prompts of one block, in blocks of four."""
    generator = torch.Generator().manual_seed(5)
    prompts = [tuple(torch.randint(0, 60, (4,), generator=generator).tolist()) for _ in range(2)]
    texts = [tuple(torch.randint(0, 60, (5 + row % 4,), generator=generator).tolist()) for row in range(6)]
    written = [Answer(prompts[row // 3], text, "", True, 1, 0) for row, text in enumerate(texts)]
    return collate(written, GROUP.tolist(), block_size=4, fill=60)


def coupled_pair(batch: RolloutBatch) -> list[Look]:
    """Half the answer and its complement, weighted as ESPO does."""
    drawn = torch.rand(batch.tokens.shape, generator=torch.Generator().manual_seed(9)) < 0.5
    looks = []
    for read in (batch.scored & drawn, batch.scored & ~drawn):
        weight = (batch.length[:, None] + 1) / read.sum(-1, keepdim=True).clamp_min(1) / 2
        looks.append(Look(read | batch.after, read, (read * weight).double(), 4))
    return looks


def left_to_right(batch: RolloutBatch) -> list[Look]:
    """One step of every block a look: its tokens are read from the left."""
    place = batch.position % 4
    looks = []
    for step in range(4):
        read = batch.scored & (place == step)
        looks.append(Look((batch.written & (place >= step)), read, read.double(), 4))
    return looks


def gradients(model, loss: torch.Tensor) -> torch.Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([part.flatten() for part in found if part is not None])


@pytest.mark.parametrize("alignment", ["block", "parent"])
@pytest.mark.parametrize(
    ("name", "knobs", "draw", "share"),
    [
        ("espo", {}, coupled_pair, "length"),
        ("espo", {"epsilon": 0.0}, coupled_pair, "length"),
        ("espo", {"clip": "both_sides", "weights": "self_normalised"}, coupled_pair, "length"),
        ("agrpo", {}, left_to_right, "none"),
        ("agrpo", {"epsilon": 0.0}, left_to_right, "none"),
        ("just_grpo", {}, left_to_right, "length"),
        ("diffu_grpo", {"beta": 0.0}, left_to_right, "none"),
        ("wd1", {}, left_to_right, "none"),
        ("spg", {"omega": 0.0}, coupled_pair, "none"),
    ],
)
def test_v6_at_ratio_1_the_gradient_is_that_of_reinforce(alignment, name, knobs, draw, share):
    """-(sum of A_i grad log p_i), with log p divided by the answer's length or not."""
    model, batch = random_model(alignment=alignment, layers=2), answers()
    looks, valid = draw(batch), torch.ones(6, dtype=torch.bool)
    with torch.no_grad():
        old = score(model, batch, looks)
    now = score(model, batch, looks)
    member = objective(name, **knobs)
    if member.level is not None:
        assert bool((ratios(now, old, valid, member.level) == 1).all())
    found = gradients(model, member.loss(PolicyInputs(now, old, None, ADVANTAGE, valid, GROUP))[0])
    logp = score(model, batch, looks).sequence / (batch.length if share == "length" else 1)
    wanted = gradients(model, -(ADVANTAGE * logp).sum())
    assert float(wanted.norm()) > 0.1
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


def test_v18_in_fp32_the_ratio_is_exactly_1_before_the_first_update():
    model, batch = random_model(dtype=torch.float32, layers=2), answers()
    for level, draw in (("sequence", coupled_pair), ("token", left_to_right)):
        with torch.no_grad():
            old = score(model, batch, draw(batch))
        assert bool((ratios(score(model, batch, draw(batch)), old, torch.ones(6, dtype=torch.bool), level) == 1).all())


# Numbers of one answer


def test_v6_the_clip_holds_in_the_direction_of_the_advantage():
    """L = 4 and a difference of 0.8: the ratio is exp(0.2) = 1.221403."""
    now, old = of_tokens([-0.8] * 4), of_tokens([-1.0] * 4).detach()
    better, worse = torch.tensor([2.0]).double(), torch.tensor([-2.0]).double()
    for clip, cut in (("ppo", 0), ("both_sides", 1)):
        member = objective("espo", clip=clip)
        loss, figures = member.loss(inputs(now, better, old))
        assert figures["ratio"].item() == pytest.approx(1.221403, abs=1e-6) and figures["clipped"].item() == 1
        assert loss.item() == pytest.approx(-2.4) and slope(member, inputs(now, better, old)) == [[0.0] * 4]
        loss, figures = member.loss(inputs(now, worse, old))
        assert figures["clipped"].item() == cut and loss.item() == pytest.approx([2.442806, 2.4][cut], abs=1e-6)
    assert slope(objective("espo"), inputs(now, worse, old)) == [pytest.approx([2 * 1.221403 / 4] * 4, abs=1e-6)]
    assert slope(objective("espo", clip="both_sides"), inputs(now, worse, old)) == [[0.0] * 4]


@pytest.mark.parametrize(("kl", "value"), [("k1", 0.8), ("k2", 0.32), ("k3", 0.249329)])
def test_v6_the_kl_of_a_whole_answer_is_divided_by_its_length_once(kl, value):
    now, reference = of_tokens([-0.8] * 4), of_tokens([-1.0] * 4).detach()
    member = objective("espo", beta=0.5, kl=kl)
    loss, figures = member.loss(inputs(now, torch.zeros(1).double(), reference=reference))
    assert figures["kl"].item() == pytest.approx(value / 4, abs=1e-6)
    assert loss.item() == pytest.approx(0.5 * value / 4, abs=1e-6)


def test_v6_a_ratio_is_normalised_by_length():
    now, old = of_tokens([-1.0] * 256), of_tokens([-1.0 - 4 / 256] * 256)
    assert ratios(now, old, torch.tensor([True]), "sequence").item() == pytest.approx(1.015748, abs=1e-6)


def test_self_normalised_weights_are_ratios_over_their_mean():
    """Differences of 0.1 and -0.1 and 1 a token: ratios 1.105, 0.905 and 2.718, the last held at 1.2."""
    now, old = of_tokens([-0.9] * 2, [-1.1] * 2, [0.0] * 2), of_tokens(*[[-1.0] * 2] * 3).detach()
    advantage, found = torch.tensor([1.0, -0.5, -0.5]).double(), [math.exp(0.1), math.exp(-0.1), 1.2]
    member = objective("espo", clip="both_sides", weights="self_normalised")
    mean = sum(found) / 3
    weights = [ratio / mean for ratio in found]
    assert member.loss(inputs(now, advantage, old))[0].item() == pytest.approx(-weights[0] + sum(weights[1:]) / 2)
    per_token = [[-weights[0] / 2] * 2, [weights[1] / 4] * 2, [0.0, 0.0]]
    assert slope(member, inputs(now, advantage, old)) == [pytest.approx(row) for row in per_token]
    member = objective("espo", weights="self_normalised")
    mean = (found[0] + found[1] + math.e) / 3
    assert slope(member, inputs(now, advantage, old))[0] == pytest.approx([-found[0] / mean / 2] * 2)


@pytest.mark.parametrize(
    ("name", "knobs", "rows", "count"),
    [
        ("agrpo", {}, [-1.0, 1.0], 2),
        ("just_grpo", {}, [-1 / 2, 1 / 4], 2),
        ("diffu_grpo", {"beta": 0.0}, [-1.0, 1.0], 6),
        ("espo", {}, [-1 / 2, 1 / 4], 2),
        ("wd1", {}, [-1.0, 1.0], 1),
        ("spg", {}, [-1.0, 1.0], 6),
        ("raft", {}, [-1 / 2, 0.0], 2),
    ],
)
def test_what_a_token_counts_in_answers_of_2_and_of_4(name, knobs, rows, count):
    now, member = of_tokens([-1.0] * 2, [-2.0] * 4), objective(name, **knobs)
    given = inputs(now, torch.tensor([1.0, -1.0]).double())
    assert slope(member, given) == [pytest.approx([rows[0]] * 2 + [0.0] * 2), pytest.approx([rows[1]] * 4)]
    assert member.count(given.valid, given.group, now.length) == count


def test_a_kl_per_token_is_k3_and_that_of_agrpo_times_the_ratio():
    now, old, reference = of_tokens([-0.8]), of_tokens([-1.0]).detach(), of_tokens([-1.6]).detach()
    given = inputs(now, torch.zeros(1).double(), old, reference)
    k3 = math.exp(-0.8) - 1 + 0.8
    loss, figures = objective("diffu_grpo").loss(given)
    assert (loss.item(), figures["kl"].item()) == pytest.approx((0.04 * k3, k3))
    loss, figures = objective("agrpo", beta=0.1).loss(given)
    assert (loss.item(), figures["kl"].item()) == pytest.approx((0.1 * k3 * math.exp(0.2), k3 * math.exp(0.2)))


def test_the_kl_of_agrpo_is_the_true_one_for_samples_of_the_old_policy():
    """Value and gradient, summed over all tokens by what the old policy draws them with."""
    old, reference = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3]], dtype=torch.float64).log()
    logits = torch.tensor([0.3, -0.4, 0.9], dtype=torch.float64, requires_grad=True)
    logp, drawn = logits.log_softmax(-1), old.exp()[None, :, None]
    now = Scores(logp[None, :, None], drawn, torch.ones(3, dtype=torch.long))
    given = inputs(now, torch.zeros(3).double(), *(replace(now, raw=p[None, :, None]) for p in (old, reference)))
    loss = objective("agrpo", beta=1.0).loss(given)[0]
    kl = (logp.exp() * (logp - reference)).sum()
    assert loss.item() == pytest.approx(kl.item(), abs=1e-12)
    found, wanted = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, kl))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_v7_the_coefficients_of_wd1():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    for moved in (rewards, rewards + 7.0):
        given = inputs(of_tokens(*[[-1.0]] * 4), advantage("weighted", moved)[0])
        found = [row[0] for row in slope(objective("wd1"), given)]
        assert found == pytest.approx([-0.366135, *[0.122045] * 3], abs=1e-6) and sum(found) == pytest.approx(0)
    same = inputs(of_tokens(*[[-1.0]] * 4), advantage("weighted", torch.ones(1, 4).double())[0])
    assert slope(objective("wd1"), same) == [[0.0]] * 4


# A policy of two steps, enumerated


class TwoSteps:
    """A first bit of sigma(a), then one of sigma(b_first); the reward is the second bit. J = 0.625."""

    J = 0.625
    GRADIENT = [0.0625, 0.125, 0.09375]
    OUTCOMES = list(product((0, 1), repeat=2))

    def __init__(self) -> None:
        self.knobs = torch.tensor([0.0, 0.0, math.log(3)], dtype=torch.float64, requires_grad=True)

    def logp(self, outcome: tuple[int, int]) -> torch.Tensor:
        """Of both bits."""
        first, second = outcome
        logits = torch.stack([self.knobs[0], self.knobs[1 + first]])
        signs = torch.tensor([2.0 * first - 1, 2.0 * second - 1], dtype=torch.float64)
        return torch.nn.functional.logsigmoid(signs * logits)

    def probability(self, outcome: tuple[int, int]) -> float:
        return self.logp(outcome).sum().exp().item()

    def scores(self, outcomes: list[tuple[int, int]], weight: list[list[float]]) -> Scores:
        """One look a step, each reading one bit where its weight is not 0: [step][outcome]."""
        logp = torch.stack([self.logp(outcome) for outcome in outcomes])
        raw, weights = torch.zeros(2, len(outcomes), 2).double(), torch.zeros(2, len(outcomes), 2).double()
        for step in range(2):
            weights[step, :, step] = torch.tensor(weight[step], dtype=torch.float64)
        read = (weights != 0).double()
        raw = read * logp
        return Scores(raw, weights, torch.full((len(outcomes),), 2))

    def gradient(self, loss: torch.Tensor) -> list[float]:
        return torch.autograd.grad(loss, self.knobs)[0].tolist()


def drawn_steps(law: dict[tuple[int, int], tuple[float, float]], factor: float, share: bool = True) -> list[float]:
    """The mean of AGRPO's gradient over outcomes and one drawn step; `law` says how each outcome draws its step."""
    policy, member = TwoSteps(), objective("agrpo")
    total = torch.zeros(()).double()
    for outcome in policy.OUTCOMES:
        gain = torch.tensor([outcome[1] - policy.J], dtype=torch.float64)
        for step, p in enumerate(law[outcome]):
            weight = factor * (0.5 / p if share else 1.0)
            now = policy.scores([outcome], [[weight if look == step else 0.0] for look in range(2)])
            total = total + policy.probability(outcome) * p * member.loss(inputs(now, gain))[0]
    return [-part for part in policy.gradient(total)]


UNIFORM = dict.fromkeys(TwoSteps.OUTCOMES, (0.5, 0.5))
UNEVEN = {(0, 0): (0.9, 0.1), (0, 1): (0.2, 0.8), (1, 0): (0.55, 0.45), (1, 1): (0.01, 0.99)}


def test_v8_j_is_0_625():
    policy = TwoSteps()
    assert sum(policy.probability(outcome) * outcome[1] for outcome in policy.OUTCOMES) == pytest.approx(policy.J)


def test_v8_all_steps_are_the_true_gradient():
    policy, member = TwoSteps(), objective("agrpo")
    total = torch.zeros(()).double()
    for outcome in policy.OUTCOMES:
        gain = torch.tensor([outcome[1] - policy.J], dtype=torch.float64)
        total = total + policy.probability(outcome) * member.loss(inputs(policy.scores([outcome], [[1], [1]]), gain))[0]
    assert [-part for part in policy.gradient(total)] == pytest.approx(policy.GRADIENT, abs=1e-12)


def test_v8_a_drawn_step_is_the_true_gradient_with_the_number_of_steps_as_a_factor():
    assert drawn_steps(UNIFORM, factor=2) == pytest.approx(TwoSteps.GRADIENT, abs=1e-12)
    assert drawn_steps(UNIFORM, factor=1) == pytest.approx([part / 2 for part in TwoSteps.GRADIENT], abs=1e-12)


def test_v8_importance_weights_make_up_for_any_law_of_steps():
    assert drawn_steps(UNEVEN, factor=2) == pytest.approx(TwoSteps.GRADIENT, abs=1e-12)
    assert drawn_steps(UNEVEN, factor=2, share=False) != pytest.approx(TwoSteps.GRADIENT, abs=1e-3)


@pytest.mark.parametrize(("baseline", "part"), [("mean", 0.5), ("leave_one_out", 1.0)])
def test_v8b_a_baseline_that_holds_the_answer_itself_takes_1_of_g(baseline, part):
    """All groups of two: half of the true gradient, and all of it."""
    policy, member = TwoSteps(), objective("agrpo")
    total = torch.zeros(()).double()
    for pair in product(policy.OUTCOMES, repeat=2):
        gain = advantage(baseline, torch.tensor([[second for _, second in pair]]).double())[0]
        loss = member.loss(inputs(policy.scores(list(pair), [[1, 1], [1, 1]]), gain))[0]
        total = total + policy.probability(pair[0]) * policy.probability(pair[1]) * loss / 2
    found = [-number for number in policy.gradient(total)]
    assert found == pytest.approx([part * number for number in policy.GRADIENT], abs=1e-12)


# Bounds


def all_masks(law, text: tuple[int, ...]) -> Scores:
    """Every mask over three positions, by how often it is drawn times L / l: the exact ELBO.

    `law(visible, masked)` is the probability of a 1 at a masked position."""
    size = len(text)
    masks = [mask for count in range(1, size + 1) for mask in combinations(range(size), count)]
    raw, weight = torch.zeros(len(masks), 1, size).double(), torch.zeros(len(masks), 1, size).double()
    for look, mask in enumerate(masks):
        one = law([text[place] for place in range(size) if place not in mask], len(mask))
        for place in mask:
            raw[look, 0, place] = math.log(one if text[place] else 1 - one)
            weight[look, 0, place] = 1 / size / math.comb(size, len(mask)) * size / len(mask)
    return Scores(raw.requires_grad_(), weight, torch.tensor([size]))


def toy_q(visible: list[int], masked: int) -> float:
    return {1: 0.9, 2: 0.7, 3: 0.5}[masked]


def toy_p(visible: list[int], masked: int) -> float:
    return (1 + sum(visible)) / (2 + len(visible))


def test_v2_the_weights_of_all_masks_are_the_elbo():
    assert all_masks(toy_q, (1, 1, 1)).sequence.item() == pytest.approx(-1.155183, abs=1e-6)
    assert all_masks(toy_q, (1, 1, 0)).sequence.item() == pytest.approx(-2.170023, abs=1e-6)
    assert all_masks(toy_p, (1, 1, 1)).sequence.item() == pytest.approx(-math.log(4), abs=1e-6)


def test_v15_the_upper_bound_of_toy_q():
    """Each token is masked among 1, 2 or 3 with the same weight: a power mean of 0.9, 0.7 and 0.5."""
    scores = all_masks(toy_q, (1, 1, 1))
    assert upper_bound(scores, 1.0).item() == pytest.approx(3 * math.log(0.7))
    assert upper_bound(scores, 2.0).item() == pytest.approx(1.5 * math.log((0.81 + 0.49 + 0.25) / 3))


@pytest.mark.parametrize("text", list(product((0, 1), repeat=3)))
def test_v15_the_upper_bound_is_above_the_lower_and_rises_with_its_order(text):
    for law in (toy_p, toy_q):
        scores = all_masks(law, text)
        found = [scores.sequence.item(), *(upper_bound(scores, beta).item() for beta in (1.0, 1.5, 4.0))]
        assert found == sorted(found) and found[1] > found[0] + 1e-3


def test_the_upper_bound_is_none_for_a_sampler_whose_order_matters():
    """Toy Q in random order writes 1, 1, 0 with log p = -1.822219."""
    orders = [0.5 * 0.7 * 0.1, 0.5 * 0.3 * 0.9, 0.5 * 0.7 * 0.9]  # the 0 is written last, second, first
    assert math.log(sum(orders) / 3) == pytest.approx(-1.822219, abs=1e-6)
    assert upper_bound(all_masks(toy_q, (1, 1, 0)), 1.0).item() == pytest.approx(2 * math.log(0.7) + math.log(0.3))
    assert 2 * math.log(0.7) + math.log(0.3) < -1.9


def test_v15_bad_answers_go_by_the_mixture_and_good_ones_by_the_elbo():
    scores = all_masks(toy_q, (1, 1, 1))
    lower, upper = scores.sequence.item(), upper_bound(scores, 1.5).item()
    good, none, bad = (torch.tensor([number]).double() for number in (2.0, 0.0, -2.0))
    for omega in (0.0, 0.5, 1.0):
        member = objective("spg", omega=omega)
        assert member.loss(inputs(scores, good))[0].item() == pytest.approx(-2 * lower)
        assert member.loss(inputs(scores, none))[0].item() == 0
        mixture = omega * upper + (1 - omega) * lower
        assert member.loss(inputs(scores, bad))[0].item() == pytest.approx(2 * mixture)


def test_v15_without_the_upper_bound_it_is_the_elbo_weighted_by_the_advantage():
    scores = all_masks(toy_q, (1, 0, 1))
    (found,) = torch.autograd.grad(
        objective("spg", omega=0.0).loss(inputs(scores, torch.tensor([-2.0]).double()))[0], scores.raw
    )
    assert torch.equal(found, 2 * scores.weight)


def test_v15_a_sure_model_has_both_bounds_0():
    for scores in (all_masks(toy_q, (1, 1, 1)), all_masks(toy_p, (1, 1, 1))):
        sure = replace(scores, raw=torch.zeros_like(scores.raw))
        assert sure.sequence.item() == 0 and upper_bound(sure, 1.5).item() == pytest.approx(0, abs=1e-12)


def test_a_token_that_no_look_reads_is_stood_for_and_has_no_gradient():
    scores = of_tokens([-1.0, -2.0, -9.0], weight=[[1.0, 1.0, 0.0]])
    assert upper_bound(scores, 2.0).item() == pytest.approx(-3.0 * 3 / 2)
    found = slope(objective("spg", omega=1.0), inputs(scores, torch.tensor([-1.0]).double()))
    assert found == [pytest.approx([1.5, 1.5, 0.0])]
