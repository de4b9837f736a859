"""Models that are not what they say: refused in one line, before anything of their size is allocated, at every door."""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hildanext.core.errors import CheckpointError, HildaError, ModelError
from hildanext.models.checkpoint import rehearse_save, save_diffusion
from hildanext.models.loading.load import load_diffusion, load_parent
from hildanext.models.start import open_beside, start_conversion
from hildanext.tokenization import is_tied, same_words
from small_models import edit_json, small_parent, small_tokenizer


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    return small_parent(tmp_path / "parent", "qwen3")


@pytest.fixture
def checkpoint(tmp_path: Path, parent: Path) -> Path:
    save_diffusion(tmp_path / "checkpoint", *start_conversion(parent, "parent", 4))
    return tmp_path / "checkpoint"


CONFIGS = {
    "an unknown type": ({"model_type": "qwen9"}, "'qwen9', which do not belong together"),
    "another type": ({"model_type": "gpt2"}, "'gpt2', which do not belong together"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads = 0, and 1 to"),
    "no heads of keys": ({"num_key_value_heads": 0}, "num_key_value_heads = 0, and 1 to"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "4 heads for 3 of keys"),
    "a million layers": ({"num_hidden_layers": 10**6}, "num_hidden_layers = 1000000, and 1 to"),
    "many layers": ({"num_hidden_layers": 9999, "layer_types": None}, "says 9999 layers, its weights hold 2"),
    "fewer layers": ({"num_hidden_layers": 1, "layer_types": None}, "says 1 layers, its weights hold 2"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
    "another width": ({"hidden_size": 64}, "has the shape"),
    "another vocabulary": ({"vocab_size": 2**20}, r"embed_tokens.weight .* has the shape \[64, 32\]"),
    "a wide middle": ({"intermediate_size": 2**20}, "gate_proj.weight .* has the shape"),
    "a number in words": ({"vocab_size": "64"}, "vocab_size = 64, and 1 to"),
    "half a unit": ({"hidden_size": 32.5}, "hidden_size = 32.5"),
    "a truth for a number": ({"num_hidden_layers": True}, "num_hidden_layers = True"),
    "no context": ({"max_position_embeddings": 0}, "max_position_embeddings = 0"),
    "a word for a number": ({"rms_norm_eps": "small"}, "rms_norm_eps that is no number"),
    "a missing size": ({"hidden_size": None}, "has no hidden_size"),
    "an unknown activation": ({"hidden_act": "nope"}, "cannot load"),
    "weights packed elsewhere": ({"quantization_config": {"quant_method": "gptq"}}, "cannot load"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_that_cannot_be_is_one_line(parent: Path, name: str):
    changes, says = CONFIGS[name]
    edit_json(parent / "config.json", **changes)
    begun = time.monotonic()
    with pytest.raises(ModelError, match=says) as caught:
        load_parent(parent)
    assert time.monotonic() - begun < 10 and "\n" not in str(caught.value) and caught.value.hint


def test_layer_types_that_are_inconsistent_are_one_line_or_unused(parent: Path):
    edit_json(parent / "config.json", layer_types=["full_attention"])
    try:
        load_parent(parent)
    except ModelError as problem:
        assert "\n" not in str(problem)


@pytest.mark.parametrize("name", ["config.json", "hilda.json", "tokenizer.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"model": 3}', "9" * 5000, '{"weight_map": {"a": 3}}'])
def test_a_file_that_is_no_such_json_is_one_line(checkpoint: Path, name: str, text: str):
    (checkpoint / name).write_text(text)
    with pytest.raises(HildaError) as caught:
        load_diffusion(checkpoint)
    assert "\n" not in str(caught.value) and caught.value.hint


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["AutoConfig", "AutoTokenizer"])
def test_code_of_a_folder_is_refused_at_once_and_nobody_is_asked(parent: Path, name: str, kind: str, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    (parent / "evil.py").write_text("raise SystemExit('ran')\n")
    edit_json(parent / name, auto_map={kind: "evil.Evil"})
    with pytest.raises(ModelError, match=f"{name}' names code of its own .auto_map., which is not run") as caught:
        load_parent(parent)
    assert "trust_remote_code" in caught.value.hint


def test_a_checkpoint_of_a_trusted_parent_needs_no_trust(parent: Path, tmp_path: Path):
    edit_json(parent / "config.json", auto_map={"AutoModel": "evil.Evil"})
    save_diffusion(tmp_path / "out", *start_conversion(parent, trust_remote_code=True))
    assert load_diffusion(tmp_path / "out")[0].card.parent == "parent"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_no_numbers_are_named(checkpoint: Path, parent: Path, tensor: str, value: str):
    for folder, load in ((checkpoint, load_diffusion), (parent, load_parent)):
        state = load_file(folder / "model.safetensors")
        state[tensor].view(-1)[5] = float(value)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=f"{tensor} of .* holds 1 values that are NaN or infinite"):
            load(folder)


def test_weights_whose_sum_alone_is_infinite_are_numbers(parent: Path):
    state = load_file(parent / "model.safetensors")
    state["model.norm.weight"][:3] = 3e38
    save_file(state, parent / "model.safetensors", metadata={"format": "pt"})
    load_parent(parent)


def test_a_tokenizer_with_more_words_than_rows_is_refused(checkpoint: Path, tmp_path: Path):
    long = small_tokenizer(70)
    long.add_special_tokens({"mask_token": "<|mask|>"})
    long.save_pretrained(checkpoint)
    with pytest.raises(ModelError, match=r"has a word '<\|mask\|>' with the id 70, the model 64 rows"):
        load_diffusion(checkpoint)
    with pytest.raises(ModelError, match="has a word 'w66' with the id 69, the model 64 rows"):
        load_parent(small_parent(tmp_path / "long", length=70))


CARDS = {
    "a mask in quotes": ({"mask_id": "60"}, "mask_id"),
    "a truth for a mask": ({"mask_id": True}, "mask_id"),
    "half a mask": ({"mask_id": 60.0}, "mask_id"),
    "a word for the mask": ({"mask_id": 5}, "the card says mask 5, the tokenizer's is 60"),
    "a mask beyond the rows": ({"mask_id": 64}, "has id 64 and 64 rows"),
    "a real number of real words": ({"vocab_real": 99}, "has vocab_real 99 and 64 rows"),
    "never beyond the rows": ({"never": [3, 64]}, "has id 64 and 64 rows"),
    "never below zero": ({"never": [-1]}, "has id -1 and 64 rows"),
    "never in quotes": ({"never": ["3"]}, "never"),
    "never a word": ({"never": "abc"}, "never"),
    "chat in quotes": ({"chat": "false"}, "chat"),
    "another block size": ({"block_size": "4"}, "block_size"),
    "blocks longer than the context": ({"block_size": 128}, "blocks of 128, the model reads 96 tokens"),
    "an unknown key": ({"maskid": 60}, "unknown key 'maskid'"),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_says_exactly_what_it_must(checkpoint: Path, name: str):
    load_diffusion(checkpoint)
    changes, says = CARDS[name]
    edit_json(checkpoint / "hilda.json", **changes)
    with pytest.raises(HildaError, match=says) as caught:
        load_diffusion(checkpoint)
    assert "\n" not in str(caught.value)


def two_matrices(folder: Path) -> Path:
    """A parent whose head is not its embedding, whatever its configuration says."""
    small_parent(folder, "qwen2", tied=False)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    return folder


def test_a_head_of_its_own_stays_one_whatever_the_configuration_calls_it(tmp_path: Path):
    want = load_file(two_matrices(tmp_path / "parent") / "model.safetensors")
    causal_lm, _ = load_parent(tmp_path / "parent")
    assert not is_tied(causal_lm) and torch.equal(causal_lm.lm_head.weight, want["lm_head.weight"])
    model, tokenizer = start_conversion(tmp_path / "parent")
    model.causal_lm.config.tie_word_embeddings = True
    save_diffusion(tmp_path / "out", model, tokenizer)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    model, _ = load_diffusion(tmp_path / "out")
    assert not is_tied(model.causal_lm) and torch.equal(model.head[:60], want["lm_head.weight"][:60])


def test_a_head_stored_twice_is_still_tied(tmp_path: Path):
    folder = small_parent(tmp_path / "parent")
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    causal_lm, _ = load_parent(folder)
    assert is_tied(causal_lm)


@pytest.mark.filterwarnings("ignore:.do_sample. is set to .False.")
def test_generation_settings_that_contradict_each_other_are_saved_as_they_were(parent: Path, tmp_path: Path):
    edit_json(parent / "generation_config.json", temperature=0.9, top_p=0.6, do_sample=False)
    model, tokenizer = start_conversion(parent)
    rehearse_save(tmp_path / "run", model, tokenizer)
    save_diffusion(tmp_path / "out", model, tokenizer)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (written["temperature"], written["top_p"], written["eos_token_id"]) == (0.9, 0.6, 1)
    assert load_diffusion(tmp_path / "out")[0].causal_lm.generation_config.temperature == 0.9


def test_a_rehearsal_leaves_nothing_behind_and_says_what_would_fail(parent: Path, tmp_path: Path, monkeypatch):
    model, tokenizer = start_conversion(parent)
    rehearse_save(tmp_path / "run", model, tokenizer)
    assert list((tmp_path / "run").iterdir()) == []
    needed = 4 * sum(part.numel() for part in model.causal_lm.parameters())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * needed))
    rehearse_save(tmp_path / "run", model, tokenizer, copies=2)
    with pytest.raises(CheckpointError, match="has room for"):
        rehearse_save(tmp_path / "run", model, tokenizer, copies=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        rehearse_save(tmp_path / "file", model, tokenizer)

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hildanext.models.checkpoint.save_tokenizer", broken)
    with pytest.raises(CheckpointError, match="out of disk"):
        rehearse_save(tmp_path / "run", model, tokenizer)
    assert list((tmp_path / "run").iterdir()) == []


def test_words_are_compared_and_not_only_counted(parent: Path, tmp_path: Path):
    model, tokenizer = start_conversion(parent)
    assert same_words(tokenizer, small_tokenizer()) and not same_words(tokenizer, small_tokenizer(61))
    frozen, _ = open_beside(parent, model, tokenizer, torch.float32)
    assert torch.equal(frozen.head, model.head)
    other = small_parent(tmp_path / "other", "qwen3", length=61)
    with pytest.raises(ModelError, match="has other tokens"):
        open_beside(other, model, tokenizer, torch.float32)
    with pytest.raises(ModelError, match="has 128 rows, the checkpoint 64"):
        open_beside(small_parent(tmp_path / "wide", rows=128), model, tokenizer, torch.float32)
