"""A parent's weights as a GGUF file, quantised as llama.cpp has it: for measuring it on the same weights.

Prompts are given as ids, so that the tokenizer in the file need only turn ids into text.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hildanext.core.errors import ModelError
from hildanext.core.json_text import parse

BLOCK = 32
"""Weights of a row that share a scale; rows that are no multiple stay in 16 bits."""
ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}


def write_gguf(path: Path, causal_lm: Any, tokenizer: Any, weights: str) -> None:
    """`weights`: Q8_0, Q4_0, Q4_1 or F32. Embedding and head have 8 bits at least, as llama.cpp's own files do.

    Raises `ModelError` where the tokenizer is no byte-level BPE or the architecture is none of ours.
    """
    import gguf

    config = causal_lm.config
    if config.model_type not in ARCHITECTURES:
        raise ModelError(f"no GGUF of a {config.model_type!r}", f"choices: {', '.join(ARCHITECTURES)}")
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[architecture])
    _settings(writer, config)
    _vocabulary(writer, tokenizer, config.vocab_size)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in causal_lm.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.detach().float().cpu().numpy()
        if config.model_type == "llama":
            values = _interleaved(name, values, config)
        _add(writer, names.get_name(name, (".weight", ".bias")), name, values, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, path)


def _settings(writer: Any, config: Any) -> None:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": getattr(config, "rope_theta", 10000.0)}
    writer.add_name("parent")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _vocabulary(writer: Any, tokenizer: Any, rows: int) -> None:
    import gguf

    model = parse(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] != "BPE":
        raise ModelError(f"no GGUF of a {model['type']} tokenizer", "measure a parent with a byte-level BPE")
    words = {index: word for word, index in tokenizer.get_vocab().items() if index < rows}
    special = set(tokenizer.all_special_ids)
    normal, control, unused = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.UNUSED
    kinds = [control if i in special else normal if i in words else unused for i in range(rows)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([words.get(i, f"[unused {i}]") for i in range(rows)])
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.eos_token_id is not None:
        writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)


def _interleaved(name: str, values: NDArray[np.float32], config: Any) -> NDArray[np.float32]:
    """llama.cpp's rotary embedding of a Llama pairs neighbours where Transformers pairs halves."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return values
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _add(writer: Any, target: str, name: str, values: NDArray[np.float32], weights: str) -> None:
    import gguf
    from gguf.quants import quantize

    if values.ndim == 1 or weights == "F32":
        writer.add_tensor(target, values)
        return
    kind = "Q8_0" if name.startswith(("model.embed_tokens", "lm_head")) else weights
    kind = kind if values.shape[-1] % BLOCK == 0 else "F16"
    kind = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(target, quantize(values, kind), raw_dtype=kind)
