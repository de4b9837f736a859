"""Advantages: what holds for all of them, and their numbers."""

import pytest
import torch

from hildanext.core.errors import ConfigError, HildaError
from hildanext.core.registry import build, under_profile
from hildanext.rl.advantages import ADVANTAGES

MEMBERS = [
    {"name": "leave_one_out"},
    {"name": "mean"},
    {"name": "standardised"},
    {"name": "weighted"},
    {"name": "weighted", "psi": 3.0, "positive": 0.8},
    {"name": "amplified"},
    {"name": "amplified", "form": "code"},
    {"name": "amplified", "solved_groups": "imitate"},
    {"name": "amplified", "form": "code", "solved_groups": "imitate"},
]


def advantage(section: dict):
    with under_profile("FULL"):
        return build("advantage", ADVANTAGES, section)


def of(section: dict, *rewards: float) -> list[float]:
    """Of one group, all valid."""
    group = torch.tensor([rewards], dtype=torch.float64)
    return advantage(section).of(group, torch.ones(1, len(rewards), dtype=torch.bool))[0].tolist()


def close(*numbers: float):
    return pytest.approx(list(numbers), abs=1e-6)


@pytest.fixture(params=MEMBERS, ids=lambda section: "-".join(map(str, section.values())))
def member(request):
    return advantage(request.param)


def drawn(groups: int = 40, answers: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards among few values, so that groups agree now and then; some groups have one valid answer or none."""
    generator = torch.Generator().manual_seed(7)
    rewards = torch.randint(0, 3, (groups, answers), generator=generator).double() / 2
    valid = torch.rand(groups, answers, generator=generator) < torch.linspace(0, 1.2, groups)[:, None]
    rewards[:5], valid[:5] = 1.0, True
    return rewards, valid


def test_the_members_are_the_table():
    assert {section["name"] for section in MEMBERS} == set(ADVANTAGES)


def test_answers_may_stand_in_any_order(member):
    rewards, valid = drawn()
    order = torch.randperm(rewards.shape[1], generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(member.of(rewards[:, order], valid[:, order]), member.of(rewards, valid)[:, order])


def test_what_is_not_valid_is_0_and_has_no_say(member):
    rewards, valid = drawn()
    found = member.of(rewards, valid)
    assert bool((found[~valid] == 0).all())
    for other in (float("nan"), float("inf"), -1e9):
        assert torch.equal(member.of(torch.where(valid, rewards, other), valid), found)


def test_less_than_two_answers_have_no_advantage(member):
    rewards, valid = drawn()
    alone = valid.sum(-1) < 2
    assert int(alone.sum()) > 3 and bool((member.of(rewards, valid)[alone] == 0).all())
    assert member.of(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)).tolist() == [[0.0]]


@pytest.mark.parametrize("reward", [0.0, 0.1, 0.7, 1 / 3, 1.0, 5.0, -2.0])
def test_equal_rewards_have_exactly_none(member, reward):
    for answers in (2, 3, 7):
        found = member.of(torch.full((1, answers), reward), torch.ones(1, answers, dtype=torch.bool))
        imitated = getattr(member, "solved_groups", None) == "imitate" and reward >= 1
        assert bool((found == 0).all()) is not imitated


def test_they_are_finite_numbers(member):
    rewards, valid = drawn()
    for scale in (1e-12, 1.0, 1e6):
        assert bool(member.of(rewards * scale, valid).isfinite().all())


def test_an_added_constant_changes_nothing(member):
    """Except where a reward of 1 means something by itself."""
    rewards, valid = drawn()
    moved = member.of(rewards + 3.0, valid)
    assert torch.allclose(moved, member.of(rewards, valid), atol=1e-9) is not hasattr(member, "solved")


def test_a_better_answer_never_has_less(member):
    rewards, valid = drawn()
    found = member.of(rewards, valid)
    better = (rewards[:, :, None] > rewards[:, None, :]) & valid[:, :, None] & valid[:, None, :]
    assert bool((found[:, :, None] > found[:, None, :])[better].all())


def test_v10_mean_leave_one_out_and_deviation():
    assert of({"name": "mean"}, 1, 0, 0, 1) == [0.5, -0.5, -0.5, 0.5]
    assert of({"name": "leave_one_out"}, 1, 0, 0, 1) == close(2 / 3, -2 / 3, -2 / 3, 2 / 3)
    each = 0.5 / (0.577350 + 1e-4)
    assert of({"name": "standardised"}, 1, 0, 0, 1) == close(each, -each, -each, each)


def test_a_deviation_that_is_rounding_is_none():
    assert of({"name": "standardised"}, 0.5, 0.5 + 1e-7) == [0.0, 0.0]
    assert of({"name": "standardised"}, 0.5, 0.5 + 1e-5)[1] > 0.04, "which is small beside 1e-4, and no rounding"


def test_v7_weights_of_wd1():
    """w+ = (0.475367, 0.174878 x 3), w- = (0.109232, 0.296923 x 3)."""
    assert of({"name": "weighted"}, 1, 0, 0, 0) == close(0.366135, -0.122045, -0.122045, -0.122045)
    assert of({"name": "weighted", "positive": 1.0}, 1, 0, 0, 0) == close(2 * 0.475367, *[2 * 0.174878] * 3)
    assert of({"name": "weighted", "positive": 0.0}, 1, 0, 0, 0) == close(-2 * 0.109232, *[-2 * 0.296923] * 3)
    for rewards in ((1, 0, 0, 0), (0.3, 0.9, 0.1, 2.0)):
        assert sum(of({"name": "weighted", "psi": 2.0}, *rewards)) == pytest.approx(0, abs=1e-12)


def test_psi_is_the_unit_of_rewards():
    halved = of({"name": "weighted", "psi": 2.0}, 0.5, 0, 0, 0)
    assert halved == pytest.approx(of({"name": "weighted"}, 1, 0, 0, 0))


def test_v16_amplification_in_both_forms():
    paper, code = {"name": "amplified"}, {"name": "amplified", "form": "code"}
    assert of(paper, 1, 0, 0, 0) == [3.0, -0.25, -0.25, -0.25]
    assert of(code, 1, 0, 0, 0) == [1.0, -0.25, -0.25, -0.25]
    assert of(code, 0.5, 0.5, 0.1, 0.1) == close(0.6, 0.6, -0.2, -0.2)
    assert of(paper | {"alpha": 2.0}, 1, 0.5, 0, 0) == close(2.0, 0.25, -0.375, -0.375)
    assert of(paper | {"solved": 2.0}, 2, 1, 0, 0) == close(3.0, 0.75, -0.75, -0.75)


def test_v16_solved_groups_are_skipped_or_imitated():
    """A group that failed as a whole teaches nothing either way."""
    for form, number in (("paper", 3.0), ("code", 1.0)):
        section = {"name": "amplified", "form": form}
        assert of(section, 1, 1, 1, 1) == [0.0] * 4
        assert of(section | {"solved_groups": "imitate"}, 1, 1, 1, 1) == [number] * 4
        assert of(section | {"solved_groups": "imitate"}, 0, 0, 0, 0) == [0.0] * 4


@pytest.mark.parametrize("name", ["weighted", "amplified"])
def test_those_of_full_methods_are_full(name):
    with pytest.raises(ConfigError, match=f"'{name}' is a FULL method"):
        build("advantage", ADVANTAGES, {"name": name})


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"name": "weighted", "psi": 0}, "psi: 0 is not above 0"),
        ({"name": "weighted", "positive": 1.5}, "positive: 1.5 is above 1"),
        ({"name": "amplified", "alpha": 0.5}, "alpha: 0.5 is below 1"),
        ({"name": "amplified", "form": "theirs"}, "form: 'theirs' is no choice"),
        ({"name": "amplified", "solved_groups": "keep"}, "solved_groups: 'keep' is no choice"),
        ({"name": "amplified", "solved": float("nan")}, "solved: nan is no number"),
        ({"name": "mean", "psi": 1}, "psi"),
        ({"name": "median"}, "unknown advantage 'median'"),
    ],
)
def test_bad_knobs_are_one_line_each(section, words):
    with pytest.raises(HildaError) as caught:
        advantage(section)
    assert words in str(caught.value) and "\n" not in str(caught.value)
