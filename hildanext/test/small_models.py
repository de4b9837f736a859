"""Folders, GGUF files and tokenizers of small random parents, made on the spot: no download."""

import json
import struct
from pathlib import Path

import torch
from gguf import GGUFWriter, TokenType
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hildanext.ar import Parent
from hildanext.models.attention.dense import install_seam
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.checkpoint import save_causal

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def small_tokenizer(length: int = 60, pad: bool = False) -> PreTrainedTokenizerFast:
    """`length` tokens: id 0 is `<s>` (BOS), 1 is `</s>` (EOS), 2 the padding where asked for, the rest are words."""
    special = ["<s>", "</s>", "<pad>"]
    vocab = {word: index for index, word in enumerate(special + [f"w{index}" for index in range(length - 3)])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(word, special=True) for word in special])
    roles = {"bos_token": "<s>", "eos_token": "</s>"} | ({"pad_token": "<pad>"} if pad else {})
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **roles)


def small_causal(
    family: str = "llama",
    rows: int = 64,
    tied: bool = True,
    seed: int = 0,
    attention: str | None = None,
    **changes: object,
) -> PreTrainedModel:
    """A random autoregressive model in fp32 with an unusual rope, so that a lost setting shows."""
    config_class, model_class = FAMILIES[family]
    fields: dict[str, object] = {
        "vocab_size": rows,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 96,
        "tie_word_embeddings": tied,
        "initializer_range": 0.35,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    config = config_class(**(fields | changes), attn_implementation=attention or install_seam())
    if hasattr(config, "rope_parameters"):
        config.rope_parameters = {"rope_theta": 500.0, "rope_type": "default"}
    else:
        config.rope_theta = 500.0
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    causal_lm = model_class(config).eval()
    torch.random.set_rng_state(state)
    return causal_lm


def small_parent(folder: Path, family: str = "llama", length: int = 60, rows: int = 64, tied: bool = True) -> Path:
    """A parent's folder as a user would have it."""
    save_causal(folder, small_causal(family, rows, tied), small_tokenizer(length))
    return folder


def shard(folder: Path) -> Path:
    """Turn a folder's one weights file into two shards with an index; returns the second."""
    from safetensors.torch import load_file, save_file

    whole = folder / "model.safetensors"
    state = load_file(whole)
    names = sorted(state)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for name, part in halves.items():
        save_file({key: state[key] for key in part}, folder / name, metadata={"format": "pt"})
    whole.unlink()
    weight_map = {key: name for name, part in halves.items() for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder / "model-00002-of-00002.safetensors"


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weight_offset(path: Path) -> int:
    """Where the header of a safetensors file ends."""
    return 8 + int(struct.unpack("<Q", path.read_bytes()[:8])[0])


def small_gguf(path: Path, causal_lm: Qwen2ForCausalLM) -> Path:
    """`causal_lm` (Qwen2, tied) as a GGUF file in fp32 with a byte-level tokenizer that adds no BOS."""
    config = causal_lm.config
    writer = GGUFWriter(path, "qwen2")
    writer.add_name("small")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(500.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", *letters, "ab", "cd"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([TokenType.CONTROL] * 2 + [TokenType.NORMAL] * (len(letters) + 2))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in parts.items()}
    for name, tensor in causal_lm.state_dict().items():
        stem, _, kind = name.rpartition(".")
        if stem in names:
            writer.add_tensor(f"{names[stem]}.{kind}", tensor.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def words_tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 to w60 with their numbers as ids; w0 is BOS, w1 EOS."""
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w2"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="w0", eos_token="w1", unk_token="w2")


def parent_of(model: DiffusionModel) -> Parent:
    """The frozen parent inside a random model, writing in those words."""
    return Parent(model.causal_lm, words_tokenizer(), model.banned)
