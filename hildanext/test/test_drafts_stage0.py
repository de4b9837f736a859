"""The conversion that keeps its parent: what it trains, measures, writes, resumes and refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hildanext.core.errors import CheckpointError, ConfigError, DataError, HildaError, ModelError
from hildanext.core.metrics_log import run_metrics
from hildanext.data.chat_dataset import ChatDataset
from hildanext.datasets import PrepareConfig, prepare
from hildanext.decoding.exact.policy import ExactConfig
from hildanext.drafts_stage0 import check, convert_kept
from hildanext.exact import generate_exact
from hildanext.inference import GenerationConfig
from hildanext.models.card import read_card
from hildanext.models.draft_card import read_draft_card
from hildanext.models.draft_checkpoint import load_drafts
from hildanext.models.gated_lora import gated_layers
from hildanext.models.loading.load import load_parent
from hildanext.models.loading.names import locate
from hildanext.recipe import StageContext
from hildanext.stages import convert as convert_stage
from hildanext.trainer.state import STATE
from hildanext.wsd_stage0 import convert
from small_models import small_tokenizer
from training_fixtures import change, losses, small_conversion

Sections = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture
def sections(tmp_path: Path) -> Sections:
    """Small and quick: a dozen steps."""
    conversion, data = small_conversion(tmp_path)
    del data["pad_to_block"]
    train = conversion["train"] | {"learning_rate": {"peak": 1e-2}}
    drafts = {"places": 3, "lora": {"rank": 4}, "loss": {"groups": 6}, "mask_positions": 300}
    return {
        "parent": conversion["parent"],
        "keep_parent": True,
        "drafts": drafts,
        "valid_rows": 4,
        "train": train,
    }, data


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hildanext.trainer.run.training_plots", lambda metrics, folder: [])


def drafts(conversion: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**conversion, "drafts": {**conversion["drafts"], **changes}}


def test_a_run_trains_adapters_measures_them_and_keeps_the_best(sections: Sections, tmp_path: Path) -> None:
    conversion, data = sections
    before, _ = load_parent(conversion["parent"])
    summary = convert_kept(conversion, data, tmp_path / "run", quiet=True)
    lines = run_metrics(tmp_path / "run")
    trained = [line for line in lines if line["kind"] == "train"]
    assert summary["whole"] and summary["mask_positions"] >= 300 > trained[-2]["mask_positions"]
    assert set(trained[0]["losses"]) == {"place_1", "place_2", "place_3"} == set(trained[-1]["losses"])
    assert set(trained[0]["accuracy_by_place"]) == {"1", "2", "3"}
    assert [line["phase"] for line in trained][0] == "warmup" and trained[-1]["phase"] == "decay"
    assert trained[-1]["total_mask_positions"] == 300
    measured = {line["step"]: line for line in lines if line["kind"] == "eval"}
    assert min(measured) == 0 and len(measured) > 2
    best = max(measured.values(), key=lambda line: (line["tokens_per_forward"], line["step"] > 0))
    assert summary["best"]["tokens_per_forward"] == max(
        line["tokens_per_forward"] for step, line in measured.items() if step > 0
    )
    card = read_draft_card(summary["checkpoint"])
    assert sum(card.acceptance) + 1 == pytest.approx(summary["best"]["tokens_per_forward"])
    assert card.mask_positions == summary["best"]["mask_positions"] > 0 and "source 'list'" in card.trained_on
    assert best["groups"] > 0
    drafter, _, _ = load_drafts(summary["checkpoint"])
    after = dict(drafter.causal_lm.named_parameters())
    for name, parameter in before.named_parameters():
        kept = after.get(name, after.get(name.replace(".weight", ".base_layer.weight")))
        assert kept is not None and torch.equal(parameter, kept), f"{name} of the parent has changed"


def test_drafts_say_the_frequent_tokens_of_the_training_data(sections: Sections, tmp_path: Path) -> None:
    conversion, data = sections
    texts = [[20, 21, 22, 23, 24, 25, 26] * 3, [20, 21, 22, 23, 24] * 4]
    for part in ("train", "valid"):
        settings = PrepareConfig(
            source={"name": "list"}, out=str(tmp_path / f"words-{part}"), add_bos=False, add_eos=False
        )
        prepare(settings, small_tokenizer(), documents=texts * 4)
        data = {**data, part: str(tmp_path / f"words-{part}")}
    summary = convert_kept(drafts(conversion, vocabulary=8), data, tmp_path / "run", quiet=True)
    drafter, _, card = load_drafts(summary["checkpoint"])
    assert card.vocabulary == 8 and drafter.draft_tokens is not None
    assert drafter.draft_tokens.tolist() == [0, 20, 21, 22, 23, 24, 25, 26]
    whole = convert_kept(drafts(conversion, vocabulary=10_000), data, tmp_path / "all", quiet=True)
    assert read_draft_card(whole["checkpoint"]).vocabulary is None, "as many as there are, or more, are all"


def test_a_text_that_repeats_itself_is_learnt_by_heart(sections: Sections, tmp_path: Path) -> None:
    """A cycle of six tokens: the loss of cross-entropy falls to almost nothing, and most at the first place."""
    conversion, data = sections
    texts = [[(start + at) % 6 + 10 for at in range(28)] for start in range(6)]
    for part in ("train", "valid"):
        settings = PrepareConfig(source={"name": "list"}, out=str(tmp_path / f"cycle-{part}"), add_eos=False)
        prepare(settings, small_tokenizer(), documents=texts * 4)
        data = {**data, part: str(tmp_path / f"cycle-{part}")}
    conversion = drafts(conversion, loss={"kind": "ce", "groups": 12}, lora={"rank": 8}, mask_positions=12_000)
    conversion = change(conversion, learning_rate={"peak": 2e-2}, evaluate_every=100)
    convert_kept(conversion, data, tmp_path / "run", quiet=True)
    lines = [line for line in run_metrics(tmp_path / "run") if line["kind"] == "train"]
    assert lines[0]["loss"] > 3.0 and lines[-1]["loss"] < 0.3
    assert all(value < 0.5 for value in lines[-1]["losses"].values())


def test_a_run_that_was_stopped_goes_on_to_the_same_losses(sections: Sections, tmp_path: Path) -> None:
    conversion, data = sections
    conversion = drafts(conversion, noise={"share": 0.5})
    straight = convert_kept(conversion, data, tmp_path / "straight", quiet=True)
    stopped = convert_kept(change(conversion, stop_after=4), data, tmp_path / "cut", quiet=True)
    assert not stopped["whole"] and "checkpoint" not in stopped
    resumed = convert_kept(conversion, data, tmp_path / "cut", quiet=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "straight")
    assert resumed["mask_positions"] == straight["mask_positions"]
    first, second = (load_drafts(summary["checkpoint"])[0] for summary in (straight, resumed))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    assert "noised" in run_metrics(tmp_path / "cut")[1]["losses"]


def test_layers_computed_again_give_the_same_losses(sections: Sections, tmp_path: Path) -> None:
    """In the backward pass the gate must stand as it stood in the forward."""
    conversion, data = sections
    for name, again in (("kept", False), ("again", True)):
        convert_kept(change(conversion, gradient_checkpointing=again), data, tmp_path / name, quiet=True)
    assert losses(tmp_path / "kept") == pytest.approx(losses(tmp_path / "again"), rel=1e-5)


def test_a_checkpoint_of_three_places_drafts_any_smaller_number_and_writes_the_parent_s_text(
    sections: Sections, tmp_path: Path
) -> None:
    conversion, data = sections
    summary = convert_kept(conversion, data, tmp_path / "run", quiet=True)
    drafter, tokenizer, card = load_drafts(summary["checkpoint"], torch.float64)
    settings = GenerationConfig(max_new_tokens=24, ignore_eos=True)
    prompts = [[5, 9, 13], [40, 7]]
    plain = generate_exact(drafter.double(), None, prompts, ExactConfig(drafter="none"), settings)
    for count in range(1, card.places + 1):
        drafted = generate_exact(drafter, None, prompts, ExactConfig(drafts=count, after="all"), settings)
        assert [result.tokens for result in drafted] == [result.tokens for result in plain]
    with pytest.raises(ConfigError, match="ask for 1 to 3 drafts"):
        generate_exact(drafter, None, prompts, ExactConfig(drafts=4, after="all"), settings)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"drafts": {"places": 0}}, "places"),
        ({"drafts": {"places": 17}}, "places"),
        ({"drafts": {"lora": {"rank": 0}}}, "rank"),
        ({"drafts": {"loss": {"kind": "mse"}}}, "kind"),
        ({"drafts": {"mask_positions": 0}}, "mask_positions"),
        ({"drafts": {"place": 4}}, "did you mean 'places'"),
        ({"drafts": {"noise": {"share": 0.5}, "enter": 1}}, "begins at its embedding"),
        ({"wsd": []}, "wsd would mean nothing: leave it out; drafts.mask_positions stands for wsd"),
        ({"turns": 2, "merge_top_k": 3}, "turns, merge_top_k would mean nothing"),
        ({"losses": [{"name": "m2t"}]}, "drafts.loss stands for losses"),
        ({"lora": {"rank": 4}}, "drafts.lora stands for lora"),
        ({"replace_rate": 0.3}, "replace_rate would mean nothing"),
        ({"alignment": "parent"}, "alignment would mean nothing"),
        ({"train": {"layout": "double"}}, "train.layout means nothing"),
        ({"train": {"mask_noise": {"deviation": 1.0}}}, "train.mask_noise means nothing"),
        ({"data": {"pad_to_block": 8}}, "data.pad_to_block 8 means nothing"),
        ({"data": {"sequence_length": 4}}, "no room for a group of 3 drafts"),
    ],
)
def test_what_means_nothing_or_cannot_be_is_one_line(sections: Sections, changes: dict[str, Any], said: str) -> None:
    conversion, data = sections
    for key, value in changes.items():
        if key == "data":
            data = {**data, **value}
        elif key in ("drafts", "train"):
            conversion = {**conversion, key: {**conversion[key], **value}}
        else:
            conversion = {**conversion, key: value}
    with pytest.raises(ConfigError, match=said) as caught:
        check(conversion, data)
    assert "\n" not in str(caught.value)


def test_keys_of_another_conversion_at_their_defaults_are_let_pass(sections: Sections) -> None:
    conversion, data = sections
    check({**conversion, "turns": 1, "merge_top_k": 1, "lora": None, "alignment": "block"}, {**data, "pad_to_block": 1})


def test_a_layer_that_is_not_there_a_diffusion_parent_and_another_tokenizer_are_one_line(
    sections: Sections, tmp_path: Path
) -> None:
    conversion, data = sections
    with pytest.raises(ModelError, match="masks cannot enter at layer 2"):
        convert_kept(drafts(conversion, enter=2), data, tmp_path / "run", quiet=True)
    diffusion = {**conversion, "parent": str(locate("tiny").parent / "diffusion")}
    with pytest.raises(ModelError, match="is a diffusion checkpoint"):
        convert_kept(diffusion, data, tmp_path / "run", quiet=True)
    with pytest.raises(DataError, match="prepared with another tokenizer"):
        convert_kept({**conversion, "parent": "tiny"}, data, tmp_path / "run", quiet=True)
    with pytest.raises(DataError, match="no room for a group of 16 drafts"):
        short = tmp_path / "short"
        texts = [[9, 10, 11, 12]] * 4
        prepare(PrepareConfig(source={"name": "list"}, out=str(short)), small_tokenizer(), documents=texts)
        convert_kept(drafts(conversion, places=16), {**data, "valid": str(short)}, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_a_folder_goes_on_only_under_what_its_state_was_reached_with(sections: Sections, tmp_path: Path) -> None:
    conversion, data = sections
    run = tmp_path / "run"
    convert_kept(change(conversion, stop_after=2), data, run, quiet=True)
    with pytest.raises(ConfigError, match="drafts.places was 3 and is 2"):
        convert_kept(drafts(conversion, places=2), data, run, quiet=True)
    ordinary, padded = small_conversion(tmp_path / "other")
    with pytest.raises(ConfigError, match="keep_parent was true and is false"):
        convert(ordinary, padded, run, quiet=True)
    convert(change(ordinary, stop_after=1), padded, tmp_path / "ordinary", quiet=True)
    with pytest.raises(ConfigError, match="keep_parent was false and is true"):
        convert_kept(conversion, data, tmp_path / "ordinary", quiet=True)
    (run / "run.json").unlink()
    with pytest.raises(CheckpointError, match="is of another model|has another shape"):
        convert_kept(drafts(conversion, places=2), data, run, quiet=True)
    assert json.loads((run / STATE / "counters.json").read_text())["step"] == 2


def test_the_stage_takes_either_way_and_refuses_half_of_one(sections: Sections, tmp_path: Path) -> None:
    conversion, data = sections
    context = StageContext(tmp_path / "run", "convert", quiet=True, alone=True)
    outcome = convert_stage.stage({**conversion, "data": data}, context)
    assert Path(outcome["model"]).name == "checkpoint"
    with pytest.raises(CheckpointError, match="draft adapters of a parent that stays"):
        read_card(outcome["model"])
    for section, said in (
        ({"drafts": {}}, "convert.drafts without keep_parent"),
        ({"keep_parent": "yes"}, "give true or false"),
        ({"keep_parent": False, "drafts": {}}, "without keep_parent"),
    ):
        with pytest.raises(HildaError, match=said):
            convert_stage.check({**section, "data": data}, context)


def test_a_parent_in_four_bits_teaches_and_stays(sections: Sections, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    conversion, data = sections
    summary = convert_kept({**conversion, "quantize": "nf4"}, data, tmp_path / "run", quiet=True)
    card = read_draft_card(summary["checkpoint"])
    assert "4 bits (nf4)" in card.trained_on
    drafter, _, _ = load_drafts(summary["checkpoint"])
    assert all(layer.lora_B.any() for _, layer in gated_layers(drafter.causal_lm)), "every adapter has learnt"


def test_of_conversations_the_answers_alone_are_learnt(tmp_path: Path) -> None:
    chat = {"train": {"name": "arithmetic", "count": 60, "steps": 1}, "valid_share": 0.2, "sequence_length": 96}
    section = {
        "keep_parent": True, "drafts": {"places": 2, "lora": {"rank": 4}, "loss": {"groups": 8}, "mask_positions": 60},
        "chat": chat, "valid_rows": 4, "train": {"batch_size": 2, "precision": "no"},
    }  # fmt: skip
    context = StageContext(tmp_path / "run", "convert", quiet=True, alone=True)
    convert_stage.check(section, context)
    outcome = convert_stage.stage(section, context)
    card = read_draft_card(outcome["model"])
    assert card.trained_on == "answers of conversations of the source 'arithmetic'"
    data = ChatDataset(tmp_path / "run" / "data", "train", 96, 1, 0)
    batch = data.batch([0, 1])
    assert 0 < int(batch.maskable.sum()) < int((batch.document >= 0).sum())
    with pytest.raises(ConfigError, match="chat.sequence_length was 96 and is 64"):
        convert_stage.stage({**section, "chat": {**chat, "sequence_length": 64}}, context)
    with pytest.raises(HildaError, match="unknown chat source"):
        convert_stage.check({**section, "chat": {"train": {"name": "riddles"}}}, context)
