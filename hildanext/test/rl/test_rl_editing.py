"""What is left of a policy's editing: measured on right answers in which a tenth of the tokens is wrong."""

from dataclasses import replace

import torch
from plugin_fixtures import END, a_policy, sums

from hildanext.rl.editing import EditingMeasure


def problems(count: int = 30):
    return [sums(f"two plus {n} so what is it", f"2+{n}={n + 2}\n#### {n + 2}") for n in range(count)]


def test_a_policy_that_always_says_one_token_mends_and_keeps_what_that_token_is():
    policy = a_policy()
    measure = EditingMeasure(policy, problems())
    for view in measure.check.views:
        assert view.replaced.any() and not (view.replaced & ~view.maskable).any() and not view.masked.any()
        inside = torch.arange(view.clean.shape[1])
        first = torch.tensor([len(policy.encode(problem)) for problem in problems()[: len(view.clean)]])
        assert not view.maskable[(inside < first.min()).expand_as(view.maskable)].any(), "prompts are whole"
    wrong = torch.cat([view.clean[view.replaced] for view in measure.check.views])
    right = torch.cat([view.clean[view.kept] for view in measure.check.views])
    for said in (int(wrong[0]), END):
        policy.model.banned.fill_(True)
        policy.model.banned[said] = False
        one = measure()
        assert set(one) == {"corrected", "kept"} and one["kept"] > 0
        assert one["corrected"] == float((wrong == said).double().mean())
        assert one["kept"] == float((right == said).double().mean())


def test_it_is_the_same_every_time_and_leaves_the_policy_as_it_was():
    policy = a_policy("block")
    policy.model.train()
    before = {name: weight.clone() for name, weight in policy.model.named_parameters()}
    state = torch.get_rng_state()
    one, two = EditingMeasure(policy, problems(5))(), EditingMeasure(policy, problems(5))()
    assert one == two and policy.model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weight, before[name]) for name, weight in policy.model.named_parameters())


def test_without_right_answers_there_is_nothing_to_say():
    policy = a_policy()
    assert EditingMeasure(policy, [replace(problem, answer=None) for problem in problems(3)])() == {}
    some = [replace(problems(2)[0], answer=None), problems(2)[1]]
    assert sum(len(view.clean) for view in EditingMeasure(policy, some).check.views) == 1
    assert int(EditingMeasure(policy, some).check.views[0].clean[0, -1]) == END
