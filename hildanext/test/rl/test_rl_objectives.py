"""Objectives: what holds for all of them, on made-up scores."""

from dataclasses import replace

import pytest
import torch

from hildanext.core.errors import ConfigError, HildaError
from hildanext.core.registry import build, under_profile
from hildanext.rl.advantages import ADVANTAGES
from hildanext.rl.looks import Scores
from hildanext.rl.objectives import OBJECTIVES
from hildanext.rl.objectives.base import PolicyInputs
from hildanext.rl.objectives.ratios import ratios

MEMBERS = [
    {"name": "espo"},
    {"name": "espo", "beta": 0.3, "kl": "k1"},
    {"name": "espo", "beta": 0.3, "kl": "k2"},
    {"name": "espo", "beta": 0.3, "kl": "k3", "clip": "both_sides"},
    {"name": "espo", "weights": "self_normalised"},
    {"name": "espo", "weights": "self_normalised", "clip": "both_sides", "beta": 0.1},
    {"name": "agrpo"},
    {"name": "agrpo", "beta": 0.3},
    {"name": "wd1"},
    {"name": "wd1pp"},
    {"name": "diffu_grpo"},
    {"name": "diffu_grpo", "beta": 0.0, "epsilon": 0.1},
    {"name": "just_grpo"},
    {"name": "spg"},
    {"name": "spg", "omega": 1.0, "beta": 1.0},
    {"name": "raft"},
]


def objective(section: dict):
    with under_profile("FULL"):
        return build("objective", OBJECTIVES, section)


@pytest.fixture(params=MEMBERS, ids=lambda section: "-".join(map(str, section.values())))
def member(request):
    return objective(request.param)


def made_up(seed: int, read: torch.Tensor, weight: torch.Tensor | None = None, spread: float = 0.25) -> Scores:
    """Scores around -1.5 nats, by a law of their own."""
    generator = torch.Generator().manual_seed(seed)
    raw = -1.5 + spread * torch.randn(read.shape, generator=generator, dtype=torch.float64)
    weight = read.double() if weight is None else weight
    return Scores((raw * read).requires_grad_(), weight, read.any(0).sum(-1))


def once(looks: int = 3, rows: int = 8, positions: int = 7) -> torch.Tensor:
    """Each token of answers of 4 to 7 tokens is read by one look."""
    look = torch.randint(0, looks, (rows, positions), generator=torch.Generator().manual_seed(3))
    inside = torch.arange(positions) < torch.arange(rows)[:, None] % 4 + 4
    return (look == torch.arange(looks)[:, None, None]) & inside


def weights_of(read: torch.Tensor) -> torch.Tensor:
    return read * (0.5 + torch.rand(read.shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64))


def round_of(weighted: bool = True, spread: float = 0.25) -> PolicyInputs:
    """Two groups of four; the third answer was not judged."""
    read = once()
    weight = weights_of(read) if weighted else None
    now, old, reference = (made_up(seed, read, weight, spread) for seed in (1, 2, 4))
    advantage = torch.tensor([1.0, -0.5, 0.0, -0.5, 0.75, -0.25, -0.25, -0.25], dtype=torch.float64)
    valid = torch.tensor([True, True, False, True, True, True, True, True])
    group = torch.tensor([5, 5, 5, 5, 2, 2, 2, 2])
    return PolicyInputs(now, old.detach(), reference.detach(), advantage, valid, group)


def some(inputs: PolicyInputs, rows: list[int]) -> PolicyInputs:
    def cut(scores: Scores) -> Scores:
        raw = scores.raw.detach()[:, rows].requires_grad_()
        return replace(scores, raw=raw, weight=scores.weight[:, rows], length=scores.length[rows])

    assert inputs.reference is not None
    scores = [cut(part) for part in (inputs.now, inputs.old, inputs.reference)]
    return PolicyInputs(*scores, inputs.advantage[rows], inputs.valid[rows], inputs.group[rows])


def grown(member, inputs: PolicyInputs) -> tuple[float, torch.Tensor, dict[str, float]]:
    """Loss, its gradient in the scores, and the figures as numbers."""
    raw = inputs.now.raw.detach().clone().requires_grad_()
    loss, figures = member.loss(replace(inputs, now=replace(inputs.now, raw=raw)))
    (gradient,) = torch.autograd.grad(loss, raw)
    assert not any(figure.requires_grad for figure in figures.values())
    return loss.item(), gradient, {name: figure.item() for name, figure in figures.items()}


def assert_same(found, wanted) -> None:
    assert found[0] == pytest.approx(wanted[0], abs=1e-12)
    torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=1e-12)
    assert found[2] == pytest.approx(wanted[2], abs=1e-12)


def test_the_members_are_the_table():
    assert {section["name"] for section in MEMBERS} == set(OBJECTIVES)


def test_a_member_says_what_it_goes_with(member):
    known = ("block_elbo", "mean_field", "trajectory", "left_to_right", "predictions")
    assert member.likelihoods and set(member.likelihoods) <= set(known)
    assert member.advantage in ADVANTAGES
    assert member.wants_reference is (getattr(member, "beta", 0) > 0 and hasattr(member, "epsilon"))


def test_a_ratio_is_exactly_1_where_the_old_policy_is_the_new_one(member):
    inputs = round_of(weighted=False)
    inputs = replace(inputs, old=inputs.now.detach())
    if member.level is not None:
        assert bool((ratios(inputs.now, inputs.old, inputs.valid, member.level) == 1).all())
    figures = grown(member, inputs)[2]
    assert ("ratio" in figures) is (member.level is not None)
    assert figures.get("clipped", 0) == 0
    if "ratio" in figures:
        assert figures["ratio"] == member.count(inputs.valid, inputs.group, inputs.now.length)


def test_who_has_no_ratio_does_not_read_the_old_policy(member):
    inputs = round_of()
    nothing = replace(inputs.old, raw=torch.full_like(inputs.old.raw, float("nan")))
    read = bool(torch.isnan(torch.tensor(grown(member, replace(inputs, old=nothing))[0])))
    assert read is (member.level is not None)


def test_a_row_that_is_not_valid_has_no_gradient_and_no_say_whatever_stands_there(member):
    inputs = round_of()
    kept = [row for row in range(8) if row != 2]
    loss, gradient, figures = grown(member, inputs)
    assert not bool(gradient[:, 2].any()) and bool(gradient[:, kept].any())
    wanted = grown(member, some(inputs, kept))
    assert_same((loss, gradient[:, kept], figures), wanted)

    def spoilt(scores: Scores) -> Scores:
        raw = scores.raw.detach().clone()
        raw[:, 2] = float("nan")
        return replace(scores, raw=raw, length=scores.length.index_fill(0, torch.tensor(2), 0))

    scores = [spoilt(part) for part in (inputs.now, inputs.old, inputs.reference)]
    advantage = inputs.advantage.clone()
    advantage[2] = float("nan")
    assert_same(grown(member, PolicyInputs(*scores, advantage, inputs.valid, inputs.group)), (loss, gradient, figures))


def test_without_a_valid_row_there_is_nothing(member):
    inputs = round_of()
    loss, gradient, figures = grown(member, replace(inputs, valid=torch.zeros_like(inputs.valid)))
    assert loss == 0 and not bool(gradient.any()) and not any(figures.values())


def test_groups_and_their_rows_may_stand_in_any_order(member):
    inputs = round_of()
    loss, gradient, figures = grown(member, inputs)
    for order in ([4, 5, 6, 7, 0, 1, 2, 3], [2, 1, 3, 0, 7, 4, 6, 5]):
        assert_same(grown(member, some(inputs, order)), (loss, gradient[:, order], figures))


def test_two_micro_batches_are_one(member):
    inputs = round_of()
    parts = [grown(member, some(inputs, rows)) for rows in ([0, 1, 2, 3], [4, 5, 6, 7])]
    figures = {name: sum(part[2][name] for part in parts) for name in parts[0][2]}
    assert_same((parts[0][0] + parts[1][0], torch.cat([part[1] for part in parts], 1), figures), grown(member, inputs))
    counts = [
        member.count(inputs.valid[part], inputs.group[part], inputs.now.length[part])
        for part in (slice(4), slice(4, 8))
    ]
    assert sum(counts) == member.count(inputs.valid, inputs.group, inputs.now.length)


def test_a_separable_loss_is_a_sum_over_looks_and_no_other_is(member):
    inputs = round_of()

    def look(scores: Scores, index: int) -> Scores:
        return replace(scores, raw=scores.raw[index : index + 1], weight=scores.weight[index : index + 1])

    def alone(index: int):
        scores = [look(part, index) for part in (inputs.now, inputs.old, inputs.reference)]
        return grown(member, PolicyInputs(*scores, inputs.advantage, inputs.valid, inputs.group))

    whole, parts = grown(member, inputs), [alone(index) for index in range(3)]
    figures = {name: sum(part[2][name] for part in parts) for name in parts[0][2]}
    summed = sum(part[0] for part in parts), torch.cat([part[1] for part in parts]), figures
    if member.separable:
        assert_same(summed, whole)
    else:
        assert summed[0] != pytest.approx(whole[0], abs=1e-6)


def test_a_reference_that_is_the_policy_holds_nothing_back(member):
    if not member.wants_reference or getattr(member, "kl", "k3") == "k1":
        return
    inputs = round_of()
    same = replace(inputs, reference=inputs.now.detach())
    loss, gradient, figures = grown(member, same)
    assert figures.pop("kl") == 0
    assert_same((loss, gradient, figures), grown(replace(member, beta=0.0), replace(inputs, reference=None)))
    apart = grown(member, inputs)
    assert apart[2]["kl"] > 0 and not torch.equal(apart[1], gradient)


def test_who_wants_no_reference_does_not_read_one(member):
    if not member.wants_reference:
        inputs = round_of()
        assert_same(grown(member, replace(inputs, reference=None)), grown(member, inputs))


def test_no_advantage_has_exactly_no_gradient(member):
    inputs = round_of()
    inputs = replace(inputs, advantage=torch.zeros_like(inputs.advantage), reference=None)
    bare = replace(member, beta=0.0) if member.wants_reference else member
    loss, gradient, _ = grown(bare, inputs)
    assert loss == 0 and not bool(gradient.any())


def test_beyond_the_clip_there_is_no_gradient_and_it_is_counted(member):
    if member.level is None:
        return
    inputs = replace(round_of(weighted=False, spread=3.0), reference=None)
    bare = replace(member, beta=0.0) if member.wants_reference else member
    _, gradient, figures = grown(bare, inputs)
    ratio = ratios(inputs.now, inputs.old, inputs.valid, bare.level).detach()
    advantage = inputs.advantage if bare.level == "sequence" else inputs.advantage[:, None].expand_as(ratio[0])
    outside = (ratio - 1).abs() > bare.epsilon
    away = (ratio > 1) & (advantage > 0) | (ratio < 1) & (advantage < 0)
    cut = outside & (away | (getattr(bare, "clip", "ppo") == "both_sides"))
    assert bool(cut.any()) and figures["clipped"] > 0
    still = gradient != 0
    still = still.any(-1).any(0) if bare.level == "sequence" else still
    counted = inputs.valid if bare.level == "sequence" else inputs.now.read & inputs.valid[:, None]
    assert torch.equal(still, counted & ~cut & (advantage != 0).expand_as(counted))
    if bare.level == "sequence" or bare.per == "token":
        assert figures["clipped"] == int(cut.sum())


def test_safe_has_espo_alone():
    for name in OBJECTIVES:
        if name == "espo":
            assert type(build("objective", OBJECTIVES, {"name": name})) is OBJECTIVES[name]
        else:
            with pytest.raises(ConfigError, match=f"'{name}' is a FULL method"):
                build("objective", OBJECTIVES, {"name": name})


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"name": "espo", "epsilon": -0.1}, "epsilon: -0.1 is below 0"),
        ({"name": "espo", "epsilon": 1.0}, "epsilon: 1.0 is not below 1"),
        ({"name": "espo", "beta": -1}, "beta: -1 is below 0"),
        ({"name": "espo", "kl": "k4"}, "kl: 'k4' is no choice"),
        ({"name": "espo", "clip": "one_side"}, "clip: 'one_side' is no choice"),
        ({"name": "espo", "weights": "all"}, "weights: 'all' is no choice"),
        ({"name": "espo", "beta": float("nan")}, "beta: nan is no number"),
        ({"name": "agrpo", "kl": "k2"}, "kl"),
        ({"name": "wd1", "beta": 0.04}, "wd1 with beta 0.04: it has no KL"),
        ({"name": "wd1", "epsilon": 0.5}, "epsilon"),
        ({"name": "just_grpo", "beta": 0.1}, "beta"),
        ({"name": "spg", "omega": 1.5}, "omega: 1.5 is above 1"),
        ({"name": "spg", "beta": 0.5}, "beta: 0.5 is below 1"),
        ({"name": "raft", "epsilon": 0.2}, "epsilon"),
        ({"name": "grpo"}, "unknown objective 'grpo'"),
    ],
)
def test_bad_knobs_of_an_objective_are_one_line_each(section, words):
    with pytest.raises(HildaError) as caught:
        objective(section)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_kl_without_a_reference_is_a_mistake_of_the_caller(member):
    if member.wants_reference:
        with pytest.raises(AssertionError, match="a KL is to a reference"):
            member.loss(replace(round_of(), reference=None))
