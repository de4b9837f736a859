"""Draft adapters on disk: whole, in peft's format, and never beside another parent."""

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hildanext.core.errors import CheckpointError, ConfigError, ModelError
from hildanext.models.draft_card import DraftCard, read_draft_card
from hildanext.models.draft_checkpoint import load_drafts, save_drafts
from hildanext.models.drafter import Drafter
from hildanext.models.gated_lora import GatedLoraConfig, gated_layers
from hildanext.models.loading.files import weights_hash
from hildanext.models.loading.load import load_parent
from small_models import edit_json, small_parent

LORA = GatedLoraConfig(rank=4)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path, Drafter]:
    """The folder of the adapters, that of their parent, and the drafter that was saved."""
    parent = small_parent(tmp_path / "parent")
    drafter = Drafter(load_parent(parent)[0], LORA, 3, enter=1, sampler=7, vocabulary=5)
    assert drafter.draft_tokens is not None
    drafter.draft_tokens.copy_(torch.tensor([1, 4, 6, 9, 11]))
    with torch.no_grad():
        for parameter in drafter.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    card = DraftCard(
        parent=str(parent),
        parent_hash=weights_hash(parent),
        places=3,
        enter=1,
        lora=LORA,
        acceptance=(0.5, 0.25),
        sampler=7,
        vocabulary=5,
    )
    save_drafts(tmp_path / "drafts", drafter, card)
    return tmp_path / "drafts", parent, drafter


def test_what_is_loaded_is_what_was_saved_and_nothing_of_the_parent_is_written(
    saved: tuple[Path, Path, Drafter],
) -> None:
    folder, _, drafter = saved
    loaded, _, card = load_drafts(folder)
    assert (card.acceptance, loaded.enter, loaded.places) == ((0.5, 0.25), 1, 3)
    for (name, one), (_, other) in zip(drafter.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert loaded.draft_tokens is not None and loaded.draft_tokens.tolist() == [1, 4, 6, 9, 11]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 60_000


def test_peft_loads_the_adapters_as_plain_lora(saved: tuple[Path, Path, Drafter]) -> None:
    folder, parent, drafter = saved
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(parent), folder)
    theirs = {name: value for name, value in plain.state_dict().items() if "lora_" in name}
    ours = {name: layer for name, layer in gated_layers(drafter.causal_lm)}
    assert len(theirs) == 2 * len(ours)
    for name, value in theirs.items():
        layer, part = name.removeprefix("base_model.model.").split(".lora_")
        assert torch.equal(value, getattr(ours[layer], f"lora_{part[0]}")), name


def test_adapters_of_another_parent_are_refused_and_the_right_one_may_be_named(
    saved: tuple[Path, Path, Drafter], tmp_path: Path
) -> None:
    folder, parent, _ = saved
    moved = parent.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="no model"):
        load_drafts(folder)
    load_drafts(folder, parent=moved)
    other = small_parent(tmp_path / "other", "qwen2")
    with pytest.raises(CheckpointError, match="of another parent than"):
        load_drafts(folder, parent=other)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("card", "holds no draft adapters"),
        ("kind", "holds no draft adapters"),
        ("format", "another format"),
        ("type", "is no whole number"),
        ("places", "do not fit the card"),
        ("file", "has no places.safetensors"),
        ("vocabulary", "do not fit the card"),
        ("ids", "none of the parent's"),
    ],
)
def test_a_folder_that_is_not_whole_is_one_line(saved: tuple[Path, Path, Drafter], broken: str, said: str) -> None:
    folder = saved[0]
    card = folder / "hilda.json"
    if broken == "card":
        card.unlink()
    elif broken == "file":
        (folder / "places.safetensors").unlink()
    elif broken == "ids":
        beside = load_file(folder / "places.safetensors")
        save_file({**beside, "vocabulary": beside["vocabulary"] + 1000}, folder / "places.safetensors")
    else:
        changes = {
            "vocabulary": {"vocabulary": None},
            "kind": {"kind": "x"},
            "format": {"format_version": 9},
            "type": {"places": "3"},
            "places": {"places": 5},
        }
        edit_json(card, **changes[broken])
    with pytest.raises((CheckpointError, ConfigError), match=said):
        load_drafts(folder)


def test_layers_and_targets_that_are_not_there_are_refused(tmp_path: Path) -> None:
    parent = load_parent(small_parent(tmp_path / "parent"))[0]
    with pytest.raises(ModelError, match="layers 0 to 1"):
        Drafter(parent, LORA, 3, enter=2)
    with pytest.raises(ConfigError, match="no layer 'w_q'"):
        Drafter(parent, GatedLoraConfig(rank=4, targets=("w_q",)), 3)


def test_a_card_says_what_it_was_made_with(saved: tuple[Path, Path, Drafter]) -> None:
    card = read_draft_card(saved[0])
    assert (card.gate, card.lora) == ("noisy", LORA)
