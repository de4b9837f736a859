"""Rollouts and updates have room in turn: what one of them needs has gone before the other begins."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hildanext.trainer.config
import hildanext.training
from hildanext.grading.rewards import REWARDS
from hildanext.rl.rollouts.engine import EngineSampler
from hildanext.rl.step import PolicyStep
from hildanext.rl_stage2 import rl
from rl_toy import LettersReward, toy_section
from training_fixtures import small_checkpoint


@pytest.fixture
def section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two rounds with a reference, and with two updates, so that old and reference are asked too."""
    monkeypatch.setitem(REWARDS, "letters", LettersReward)
    model = str(small_checkpoint(tmp_path / "model"))
    return toy_section(model, rounds=2, updates=2, objective={"name": "espo", "beta": 0.1})


def test_keys_and_values_of_the_answers_are_gone_before_anything_is_scored(
    section: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    engines: list[Any] = []
    held: dict[str, list[int]] = {"sampled": [], "scored": []}
    sample, scores = EngineSampler.sample, PolicyStep.scores

    def sampled(self: EngineSampler, *values: Any, **named: Any) -> Any:
        engines[:] = [self.engine]
        answers = sample(self, *values, **named)
        held["sampled"].append(self.engine.load().cache_bytes)
        return answers

    def scored(self: PolicyStep, *values: Any, **named: Any) -> Any:
        held["scored"].append(engines[0].load().cache_bytes)
        return scores(self, *values, **named)

    monkeypatch.setattr(EngineSampler, "sample", sampled)
    monkeypatch.setattr(PolicyStep, "scores", scored)
    rl(section, tmp_path / "run", "FULL", quiet=True)
    assert held["sampled"] and not any(held["sampled"]), "what an answer leaves serves nobody after the update"
    assert held["scored"] and not any(held["scored"])


class Resting:
    """As `OffloadedStates`, of which it only says where the states would be."""

    away = False

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        pass

    @contextlib.contextmanager
    def onload(self) -> Iterator[None]:
        Resting.away = False
        yield
        self.offload()

    def offload(self) -> None:
        Resting.away = True


def test_the_optimiser_s_states_rest_while_answers_are_written_and_scored(
    section: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """`train.offload` of a card, with a stand-in for what moves them."""
    seen: dict[str, set[bool]] = {"sample": set(), "scores": set(), "step": set()}
    sample, scores, step = EngineSampler.sample, PolicyStep.scores, torch.optim.AdamW.step

    def noted(name: str, plain: Any) -> Any:
        def call(*values: Any, **named: Any) -> Any:
            seen[name].add(Resting.away)
            return plain(*values, **named)

        return call

    monkeypatch.setattr(hildanext.training, "OffloadedStates", Resting)
    monkeypatch.setattr(hildanext.trainer.config, "check_device", lambda *values: None)
    section["train"] = {**section["train"], "offload": "optimizer"}
    section["measure"] = {"problems": 1, "samples": 0}
    plain_train = hildanext.training._Loop.run_to_end

    def to_end(self: Any, quiet: bool) -> None:  # the start is measured before there are any states
        monkeypatch.setattr(EngineSampler, "sample", noted("sample", sample))
        monkeypatch.setattr(PolicyStep, "scores", noted("scores", scores))
        monkeypatch.setattr(torch.optim.AdamW, "step", noted("step", step))
        plain_train(self, quiet)

    monkeypatch.setattr(hildanext.training._Loop, "run_to_end", to_end)
    rl(section, tmp_path / "run", "FULL", quiet=True)
    assert seen == {"sample": {True}, "scores": {True}, "step": {False}}
