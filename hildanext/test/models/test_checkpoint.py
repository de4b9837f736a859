"""Diffusion checkpoints: round trip, adapters and the mask's vector merged on save, averaging, atomicity."""

import errno
import json
import shutil

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from hildanext.core.errors import CheckpointError
from hildanext.models.attention.dense import MaskedAttention
from hildanext.models.card import read_card
from hildanext.models.checkpoint import load_weights, merge_checkpoints, plain_state, save_diffusion
from hildanext.models.loading.load import load_diffusion
from hildanext.models.lora import LoraConfig, add_lora
from hildanext.models.start import start_conversion
from hildanext.tokenization import is_tied
from small_models import FAMILIES, edit_json, small_parent

TOKENS = torch.tensor([[0, 5, 60, 33, 60, 7, 40, 12]])


def hidden_of(model) -> torch.Tensor:
    mask = torch.ones(1, 8, 8, dtype=torch.bool)
    with torch.no_grad():
        return model(model.embed(TOKENS), torch.arange(8)[None], MaskedAttention(mask))


@pytest.fixture
def started(tmp_path):
    return start_conversion(small_parent(tmp_path / "parent"), "parent", 4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_reads_back_as_it_was_written(tmp_path, family, tied):
    model, tokenizer = start_conversion(small_parent(tmp_path / "parent", family, tied=tied), "block", 8)
    save_diffusion(tmp_path / "run", model, tokenizer)
    again, tokenizer_again = load_diffusion(tmp_path / "run")
    assert again.card == model.card == read_card(tmp_path / "run")
    assert is_tied(again.causal_lm) == tied
    assert torch.equal(hidden_of(again), hidden_of(model))
    assert torch.equal(again.logits(hidden_of(again)), model.logits(hidden_of(model)))
    assert tokenizer_again.mask_token_id == model.card.mask_id
    assert tokenizer_again.get_vocab() == tokenizer.get_vocab()


def test_a_grown_checkpoint_reads_back_with_all_its_rows(tmp_path):
    model, tokenizer = start_conversion(small_parent(tmp_path / "parent", length=64), "parent", 4)
    save_diffusion(tmp_path / "run", model, tokenizer)
    again, tokenizer_again = load_diffusion(tmp_path / "run")
    assert again.head.shape == (128, 32) and torch.equal(again.head, model.head)
    assert (again.card.mask_id, again.card.vocab_real, len(tokenizer_again)) == (64, 64, 65)


def test_a_tied_head_is_stored_once_and_in_the_dtype_asked_for(tmp_path, started):
    save_diffusion(tmp_path / "run", *started, dtype=torch.float16)
    with safe_open(str(tmp_path / "run" / "model.safetensors"), framework="pt") as file:
        names = set(file.keys())
        assert file.get_tensor("model.embed_tokens.weight").dtype == torch.float16
    assert "lm_head.weight" not in names
    assert json.loads((tmp_path / "run" / "config.json").read_text())["torch_dtype"] == "float16"
    assert started[0].dtype == torch.float32, "the model in memory keeps its own"


def test_the_configuration_is_written_for_both_major_versions_of_transformers(tmp_path, started):
    save_diffusion(tmp_path / "run", *started)
    fields = json.loads((tmp_path / "run" / "config.json").read_text())
    assert fields["rope_theta"] == 500.0
    assert fields.get("rope_parameters", {"rope_theta": 500.0})["rope_theta"] == 500.0
    assert fields["architectures"] == ["LlamaForCausalLM"] and "quantization_config" not in fields


def test_the_weights_are_readable_by_others_than_their_owner(tmp_path, started):
    save_diffusion(tmp_path / "run", *started)
    modes = {path.stat().st_mode for path in (tmp_path / "run").iterdir()}
    assert len(modes) == 1


def test_adapters_and_the_masks_vector_are_merged_on_save(tmp_path):
    model, tokenizer = start_conversion(small_parent(tmp_path / "parent"), "parent", 4, mask_delta=True)
    add_lora(model, LoraConfig(rank=2, alpha=4.0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    want = hidden_of(model.eval())
    save_diffusion(tmp_path / "run", model, tokenizer)
    again, _ = load_diffusion(tmp_path / "run")
    torch.testing.assert_close(hidden_of(again), want, atol=1e-5, rtol=1e-4)
    assert torch.equal(hidden_of(model), want), "saving changed the model in memory"
    plain, _ = start_conversion(tmp_path / "parent", "parent", 4)
    assert not torch.allclose(hidden_of(plain), want, atol=1e-2), "the adapters did nothing: a vacuous test"
    assert set(plain_state(model.causal_lm)) == set(plain_state(plain.causal_lm))


def copies(folder, started, count: int):
    """`count` equal checkpoints with weights that three thirds would not restore."""
    for index in range(count):
        save_diffusion(folder / str(index), *started)
    return [folder / str(index) for index in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_averaging_copies_returns_the_checkpoint_bit_for_bit(tmp_path, started, count):
    merged = merge_checkpoints(copies(tmp_path, started, count))
    want = load_file(tmp_path / "0" / "model.safetensors")
    assert merged.keys() == want.keys()
    assert all(torch.equal(merged[name], want[name]) for name in want)


def test_averaging_weights_and_their_negatives_gives_zeros(tmp_path, started):
    first, second = copies(tmp_path, started, 2)
    state = load_file(second / "model.safetensors")
    negative = {name: -tensor for name, tensor in state.items()}
    save_file(negative, second / "model.safetensors", metadata={"format": "pt"})
    merged = merge_checkpoints([first, second])
    assert all(tensor.dtype == torch.float32 and not tensor.any() for tensor in merged.values())


def test_half_precision_checkpoints_are_averaged_in_fp32(tmp_path, started):
    folders = copies(tmp_path, started, 2)
    for index, folder in enumerate(folders):
        state = load_file(folder / "model.safetensors")
        filled = {name: torch.full_like(tensor, 1.0 + index / 1024).half() for name, tensor in state.items()}
        save_file(filled, folder / "model.safetensors", metadata={"format": "pt"})
    merged = merge_checkpoints(folders)
    assert all(tensor.eq(1.0 + 0.5 / 1024).all() for tensor in merged.values())


@pytest.mark.parametrize("wrong", ["names", "shapes", "card"])
def test_checkpoints_that_differ_in_kind_are_not_averaged(tmp_path, started, wrong):
    folders = copies(tmp_path, started, 2)
    path = folders[1] / "model.safetensors"
    state = load_file(path)
    if wrong == "names":
        state["model.other.weight"] = state.pop("model.norm.weight")
    elif wrong == "shapes":
        state["model.norm.weight"] = torch.ones(16)
    else:
        edit_json(folders[1] / "hilda.json", block_size=8)
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError):
        merge_checkpoints(folders)


def test_nothing_to_average_is_an_error():
    with pytest.raises(CheckpointError, match="nothing"):
        merge_checkpoints([])


def test_an_average_loads_into_the_model(tmp_path, started):
    model, tokenizer = started
    merged = merge_checkpoints(copies(tmp_path, started, 2))
    want = hidden_of(model)
    with torch.no_grad():
        for parameter in model.causal_lm.parameters():
            parameter.add_(1.0)
    load_weights(model, merged)
    assert torch.equal(hidden_of(model), want)
    merged["model.other.weight"] = merged.pop("model.norm.weight")
    with pytest.raises(CheckpointError, match="do not fit"):
        load_weights(model, merged)


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, started, monkeypatch):
    model, tokenizer = started
    save_diffusion(tmp_path / "run", model, tokenizer)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hildanext.models.checkpoint.save_file", full)
    with pytest.raises(CheckpointError, match="out of disk"):
        save_diffusion(tmp_path / "run", model, tokenizer)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parent", "run"]


def test_a_folder_that_goes_away_under_a_run_is_one_line(tmp_path, started, monkeypatch):
    def gone(*_: object, **__: object) -> None:
        shutil.rmtree(tmp_path / "run.tmp", ignore_errors=True)
        raise SafetensorError("Error while serializing: I/O error: No such file or directory (os error 2)")

    monkeypatch.setattr("hildanext.models.checkpoint.save_file", gone)
    with pytest.raises(CheckpointError, match="No such file or directory.*see that its folder is there"):
        save_diffusion(tmp_path / "run", *started)


@pytest.mark.parametrize("text", ["{", "[]", '{"format_version": 99}', '{"format_version": 1, "mask_id": -1}'])
def test_a_broken_card_is_an_error(tmp_path, started, text):
    from hildanext.core.errors import HildaError

    save_diffusion(tmp_path / "run", *started)
    (tmp_path / "run" / "hilda.json").write_text(text)
    with pytest.raises(HildaError):
        load_diffusion(tmp_path / "run")
