"""Residual inputs while a model learns: what is fed, from whom, that it resumes, and what the checkpoint says."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import random_model
from hildanext.core.errors import ConfigError, ModelError
from hildanext.core.registry import under_profile
from hildanext.corruption.input_layout import choose_layout
from hildanext.losses import SupervisedStep
from hildanext.losses.mask_to_token import MaskToToken
from hildanext.losses.residual_inputs import ResidualConfig, ResidualInputs
from hildanext.memory_plan.machine import MACHINES
from hildanext.memory_plan.sections import convert_question
from hildanext.memory_plan.step import standing_parts, weights_bytes
from hildanext.memory_plan.switches import SWITCHES, switched
from hildanext.models.card import ResidualCard, card_text, read_card
from hildanext.models.lora import LoraConfig, add_lora
from hildanext.sft_stage1 import check as check_sft
from hildanext.sft_stage1 import sft
from hildanext.trainer.config import TrainConfig
from hildanext.trainer.sharded import check_shardable
from hildanext.wsd_stage0 import check, convert
from noised_examples import answers, make_view
from training_fixtures import change, losses, small_checkpoint, small_conversion


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hildanext.trainer.run.training_plots", lambda metrics, folder: [])


@pytest.fixture
def sections(tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    conversion, data = small_conversion(tmp_path)
    phases = [{"phase": "warmup", "block_size": 1, "tokens": 128}, {"phase": "decay", "block_size": 8, "tokens": 256}]
    return {**conversion, "wsd": phases, "losses": [{"name": "m2t"}, {"name": "t2t"}]}, data


def fed_of(model, view, residual=None, progress=0.0):
    """The embeddings that a training forward feeds, and its outcome."""
    step, fed, forward = SupervisedStep(model, {"m2t": MaskToToken()}, residual=residual), [], type(model).forward
    model.forward = lambda embeddings, *rest: (fed.append(embeddings), forward(model, embeddings, *rest))[1]
    outcome = step(view, progress=progress)
    del model.forward
    return fed[-1], outcome


@pytest.mark.parametrize("alignment", ["block", "parent"])
@pytest.mark.parametrize("view", [make_view(), answers([[[4, 6, 3, 5]], [[8, 8]]])], ids=["text", "answers"])
def test_masks_are_fed_with_what_the_reference_thinks_and_nothing_else_changes(alignment, view):
    """Against the equations, with the reference's logits read by hand; gradients reach the learner's table alone."""
    model, reference = (random_model("llama", alignment, 4, seed=seed, layers=2) for seed in (1, 2))
    if alignment == "parent":
        first = (view.position > 0) & view.maskable
        view = replace(
            view, noisy=torch.where(first, view.noisy, view.clean), masked=view.masked & first, maskable=first
        )
    settings = ResidualConfig(lam=0.6, t_res=0.8, top=0, ramp=0.5)
    plain, outcome = fed_of(model, view)
    mixed, other = fed_of(model, view, ResidualInputs(reference, settings, chunk=3), progress=0.25)
    fed = choose_layout(view, model.card.shift)
    hidden, of_reference = [], type(reference).forward
    reference.forward = lambda *inputs: (hidden.append(of_reference(reference, *inputs)), hidden[-1])[1]
    fed_of(model, view, ResidualInputs(reference, settings), progress=1.0)
    index = fed.prediction_index(view.position, 4, model.card.shift)
    at = torch.zeros(plain.shape[:2], dtype=torch.bool)
    for row, place in view.masked.nonzero().tolist():
        column = int(fed.noisy_column[row, place])
        at[row, column] = True
        logits = reference.logits(hidden[-1][row, int(index[row, place])])
        p, soft = logits.softmax(-1), (logits / 0.8).softmax(-1)
        alpha = 0.3 * torch.special.entr(soft).sum() / torch.tensor(61.0, dtype=torch.float64).log()
        wanted = (1 - alpha) * plain[row, column] + alpha * (p @ model.input_table.rows)
        torch.testing.assert_close(mixed[row, column], wanted, rtol=0, atol=1e-12)
    assert torch.equal(mixed[~at], plain[~at]) and not torch.equal(outcome.total, other.total)
    other.total.backward()
    assert all(parameter.grad is None for parameter in reference.parameters())
    assert model.input_table.rows.grad is not None


def test_without_masks_or_weight_nothing_is_asked():
    model = random_model("llama", "parent", 4, layers=2)
    reference = random_model("llama", "parent", 4, layers=1)
    reference.forward = lambda *_: pytest.fail("the reference was asked")
    asks = ResidualInputs(reference, ResidualConfig(ramp=1.0))
    for view, progress in ((make_view(), 0.0), (make_view(block=1), 0.5), (make_view(t=1e-9), 0.5)):
        plain, mixed = fed_of(model, view), fed_of(model, view, asks, progress)
        assert torch.equal(plain[0], mixed[0]) and torch.equal(plain[1].total, mixed[1].total)
    assert [ResidualConfig(lam=0.8, ramp=0.5).lam_at(p) for p in (0.0, 0.25, 0.5, 1.0)] == [0.0, 0.4, 0.8, 0.8]
    assert ResidualConfig().lam_at(0.0) == 1.0


def test_the_weights_under_adapters_are_the_start():
    model = random_model("llama", "block", 4, layers=2)
    view, settings = make_view(), ResidualConfig(top=8)
    start = copy.deepcopy(model)
    add_lora(model, LoraConfig(rank=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    (own, outcome), (copied, other) = (fed_of(model, view, ResidualInputs(one, settings)) for one in (model, start))
    assert torch.equal(own, copied) and torch.equal(outcome.total, other.total)
    outcome.total.backward()
    assert any(parameter.grad is not None for name, parameter in model.named_parameters() if "lora_" in name)


def test_a_conversion_with_residuals_learns_otherwise_resumes_and_says_so(sections, tmp_path: Path):
    conversion, data = sections
    convert(conversion, data, tmp_path / "plain", quiet=True)
    conversion = {**conversion, "residual": {"ramp": 0.5, "top": 8}}
    summary = convert(conversion, data, tmp_path / "whole", "FULL", quiet=True)
    plain, whole = losses(tmp_path / "plain"), losses(tmp_path / "whole")
    assert plain[0] == whole[0] and plain[-1] != whole[-1], "block size 1 of parent alignment has no masks"
    convert(change(conversion, stop_after=len(whole) - 2), data, tmp_path / "cut", "FULL", quiet=True)
    assert len(losses(tmp_path / "cut")) == len(whole) - 2
    convert(conversion, data, tmp_path / "cut", "FULL", quiet=True)
    assert losses(tmp_path / "cut") == whole
    assert read_card(summary["checkpoint"]).residual == ResidualCard(lam=1.0, t_res=1.0, top=8)
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["full"] == ["residual"]
    assert "residual" not in json.loads((tmp_path / "plain" / "checkpoint" / "hilda.json").read_text())
    named = {**conversion, "residual": {"reference": str(tmp_path / "plain" / "checkpoint")}}
    convert(change(named, stop_after=len(whole) - 1), data, tmp_path / "named", "FULL", quiet=True)
    assert losses(tmp_path / "named")[-1] not in (plain[-2], whole[-2])
    with pytest.raises(ConfigError, match="reference"):
        other = {**named, "residual": {"reference": summary["checkpoint"]}}
        convert(other, data, tmp_path / "named", "FULL", quiet=True)
    with pytest.raises(ModelError, match="has alignment parent, what is trained block"):
        convert({**named, "alignment": "block"}, data, tmp_path / "other", "FULL", quiet=True)


def test_a_fine_tuning_takes_residuals_too(tmp_path: Path):
    """With two turns of complementary pairs, from its own start; a plain one learns otherwise."""
    settings = {
        "model": str(small_checkpoint(tmp_path / "start")),
        "epochs": 0.4,
        "valid_rows": 2,
        "samples": {"count": 0},
        "train": {"batch_size": 4, "precision": "no", "evaluate_every": 100},
    }
    chat = {"train": {"name": "arithmetic", "count": 24, "steps": 1}, "valid_share": 0.15, "sequence_length": 96}
    sft(settings, chat, tmp_path / "plain", quiet=True)
    summary = sft({**settings, "residual": {"top": 4}}, chat, tmp_path / "mixed", "FULL", quiet=True)
    assert read_card(summary["checkpoint"]).residual == ResidualCard(lam=1.0, t_res=1.0, top=4)
    plain, mixed = losses(tmp_path / "plain"), losses(tmp_path / "mixed")
    assert len(plain) == len(mixed) and all(one != other for one, other in zip(plain, mixed, strict=True))


def test_a_card_without_the_field_is_what_it_was():
    card = random_model().card
    assert "residual" not in json.loads(card_text(card))
    trained = replace(card, residual=ResidualConfig(lam=0.5).card)
    assert json.loads(card_text(trained))["residual"] == {"lam": 0.5, "t_res": 1.0, "top": 64}


def test_bad_input_is_one_line(tmp_path: Path):
    conversion = {"parent": "tiny", "wsd": [{"phase": "decay", "block_size": 8, "tokens": 64}], "block_size": 8}
    data = {"train": "", "valid": "", "sequence_length": 32}
    with pytest.raises(ConfigError, match="'residual' is a FULL method"):
        check({**conversion, "residual": {}}, data)
    with pytest.raises(ConfigError, match="'residual' is a FULL method"):
        check_sft({"model": "tiny", "residual": {}}, {"train": {"name": "arithmetic"}})
    with under_profile("FULL"):
        check({**conversion, "residual": {}}, data)
        for wrong, says in (
            ({"lam": 0.0}, "lam: 0.0"),
            ({"ramp": 1.5}, "ramp: 1.5"),
            ({"t_res": -1.0}, "t_res: -1.0"),
            ({"top": -1}, "top: -1"),
            ({"refrence": "tiny"}, "unknown key 'residual.refrence'"),
        ):
            with pytest.raises(ConfigError, match=says) as caught:
                check({**conversion, "residual": wrong}, data)
            assert "\n" not in str(caught.value)
    model = random_model(layers=1)
    step = SupervisedStep(model, {"m2t": MaskToToken()}, residual=ResidualInputs(model, ResidualConfig()))
    with pytest.raises(ConfigError, match="residual inputs and a sharded model"):
        check_shardable(step, TrainConfig(), False)


def test_a_plan_counts_the_reference():
    machine = MACHINES["pascal"]
    section = {
        "parent": "smollm2-135m", "block_size": 8, "losses": [{"name": "m2t"}],
        "wsd": [{"phase": "decay", "block_size": 8, "tokens": 64}],
    }  # fmt: skip
    with under_profile("FULL"):
        plain, own, adapted = (
            convert_question({**section, **more}, {}, machine).cases[0]
            for more in ({}, {"residual": {}}, {"residual": {}, "lora": {}})
        )
        question = convert_question({**section, "residual": {}}, {}, machine)
    size = weights_bytes(own.shape, False, own.how.narrow)
    assert size > 2 * own.shape.parameters - 1
    assert [standing_parts(case)["reference"] for case in (plain, own, adapted)] == [0, size, 0]
    lora = next(switch for switch in SWITCHES if switch.name.startswith("lora"))
    assert standing_parts(switched(question, [lora]).cases[0])["reference"] == 0
