"""Who samples: answers of now, the same whoever else is asked, dropped where they are late; and a server elsewhere."""

from typing import Any

import pytest
import torch

from hildanext.core.errors import CheckpointError, ConfigError, HildaError
from hildanext.core.registry import build
from hildanext.models.loading.load import load_diffusion
from hildanext.rl.policy import Policy
from hildanext.rl.rollouts import ROLLOUTS, Rollouts, Sampler
from training_fixtures import small_checkpoint

CASES: dict[str, dict[str, Any]] = {
    "engine": {"max_new_tokens": 9, "per_step": 2, "slots": 4},
    "openai": {"max_new_tokens": 9, "base_url": "http://127.0.0.1:9"},
}
PROMPTS = [(5, 6, 7), (5, 6, 7), (9, 10, 11, 12, 13, 14, 15, 16, 17), (20,)]
SEEDS = [1, 2, 3, 4]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_checkpoint(tmp_path_factory.mktemp("rollouts") / "model"))


@pytest.fixture
def policy(checkpoint: str) -> Policy:
    return Policy(*load_diffusion(checkpoint), chat=False, adapters=False)


@pytest.fixture
def sampler(policy: Policy) -> Any:
    opened = build("rollouts", ROLLOUTS, {"name": "engine", **CASES["engine"]}).open(policy, "SAFE")
    yield opened
    opened.close()


@pytest.mark.parametrize("name", ROLLOUTS)
def test_every_row_has_a_case_and_builds(name: str):
    member = build("rollouts", ROLLOUTS, {"name": name, **CASES[name]})
    assert isinstance(member, Rollouts) and member.together >= 1 and isinstance(member.traced, bool)
    with pytest.raises(ConfigError):
        build("rollouts", ROLLOUTS, {"name": name, **CASES[name], "temperature": 0.0})


def test_answers_are_whole_and_told_apart_by_their_seeds(sampler: Sampler):
    answers = sampler.sample(PROMPTS, SEEDS)
    assert [answer.prompt for answer in answers] == PROMPTS
    assert answers[0].tokens != answers[1].tokens, "two seeds of one prompt"
    for answer in answers:
        trace = answer.trajectory
        assert 1 <= len(answer.tokens) <= 9 and answer.forwards > 0
        assert len(trace.tokens) % 8 == 0 and trace.prompt == len(answer.prompt) and not trace.biased
        written = slice(trace.prompt, trace.prompt + len(answer.tokens))
        assert (trace.step[written] >= 0).all() and (trace.logp[written] < 0).all()


def test_an_answer_is_the_same_alone_and_in_company(sampler: Sampler):
    together = sampler.sample(PROMPTS, SEEDS)
    for number, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        alone = sampler.sample([prompt], [seed])[0]
        assert alone.tokens == together[number].tokens
        assert alone.trajectory.logp == pytest.approx(together[number].trajectory.logp, abs=1e-5)


def test_asked_in_one_moment_twice_the_bits_are_the_same(sampler: Sampler):
    first = sampler.sample(PROMPTS * 4, list(range(16)))
    sampler.changed()  # what is kept of prompts goes
    again = sampler.sample(PROMPTS * 4, list(range(16)))
    for one, other in zip(first, again, strict=True):
        assert one.tokens == other.tokens and (one.trajectory.logp == other.trajectory.logp).all()


def test_temperature_0_is_greedy_whatever_the_seed(sampler: Sampler):
    one, other = (sampler.sample([PROMPTS[2]], [seed], 0.0)[0] for seed in (1, 1))
    assert one.tokens == other.tokens


def test_weights_that_move_are_sampled_from_and_counted(policy: Policy, sampler: Sampler):
    before = sampler.sample(PROMPTS, SEEDS)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    sampler.changed()
    after = sampler.sample(PROMPTS, SEEDS)
    assert {answer.weights for answer in before} == {0} and {answer.weights for answer in after} == {1}
    assert [answer.tokens for answer in before] != [answer.tokens for answer in after]


def test_an_answer_of_other_weights_is_an_error(sampler: Any):
    sampler.engine.weights_changed()
    with pytest.raises(CheckpointError, match="weights 1 where the policy's are 0"):
        sampler.sample(PROMPTS[:1], [1])


def test_what_is_not_whole_in_time_is_dropped(policy: Policy):
    rollouts = build("rollouts", ROLLOUTS, {"name": "engine", **CASES["engine"], "seconds": 1e-6})
    sampler = rollouts.open(policy, "SAFE")
    try:
        assert sampler.sample(PROMPTS, SEEDS) == [None] * 4
    finally:
        sampler.close()


def test_the_policy_writes_in_eval_mode_and_learns_in_its_own(policy: Policy, sampler: Sampler):
    policy.model.train()
    sampler.sample(PROMPTS[:1], [1])
    assert policy.model.training


def test_a_decoder_with_edits_is_recorded_with_them(policy: Policy):
    section = {"name": "threshold_edit", "tau_mask": 0.001, "tau_edit": 0.0, "max_post": 2}
    rollouts = build("rollouts", ROLLOUTS, {"name": "engine", "max_new_tokens": 9, "decoder": section})
    sampler = rollouts.open(policy, "SAFE")
    try:
        answers = sampler.sample(PROMPTS, SEEDS)
        assert all(answer.trajectory is not None for answer in answers)
    finally:
        sampler.close()
    with pytest.raises(ConfigError, match="temperature"):
        build("rollouts", ROLLOUTS, {"name": "engine", "decoder": {**section, "temperature": 1.0}})


def test_rounds_of_a_server_whose_weights_stay_are_refused_unless_allowed():
    rollouts = build("rollouts", ROLLOUTS, {"name": "openai", **CASES["openai"]})
    rollouts.check_run(1)
    with pytest.raises(ConfigError, match="not those of the policy"):
        rollouts.check_run(2)
    build("rollouts", ROLLOUTS, {"name": "openai", **CASES["openai"], "stale": "allow"}).check_run(2)


def test_a_server_s_answers_are_its_text_in_the_policy_s_tokens(policy: Policy):
    pytest.importorskip("fastapi")
    from misbehaving import misbehaving, tells

    with misbehaving(tells) as server:
        section = {"name": "openai", "max_new_tokens": 9, "base_url": server.url}
        sampler = build("rollouts", ROLLOUTS, section).open(policy, "SAFE")
        try:
            answers = sampler.sample(PROMPTS[:2], SEEDS[:2])
        finally:
            sampler.close()
    for answer in answers:
        assert answer.trajectory is None and answer.text
        ids = list(answer.tokens[:-1] if answer.ended else answer.tokens)
        assert policy.tokenizer.decode(ids) == answer.text


def test_a_server_that_is_not_there_is_one_line(policy: Policy):
    with pytest.raises(HildaError) as problem:
        build("rollouts", ROLLOUTS, {"name": "openai", **CASES["openai"]}).open(policy, "SAFE")
    assert "\n" not in problem.value.line() and not isinstance(problem.value, CheckpointError)
