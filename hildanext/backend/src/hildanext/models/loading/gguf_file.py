"""GGUF files: de-quantised by Transformers into plain weights, with the tokenizer that the file describes."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from hildanext.core.errors import ModelError
from hildanext.models.attention.dense import install_seam
from hildanext.models.loading.files import AGAIN, DTYPE, first_line, no_progress_bars
from hildanext.models.loading.model_config import read_config
from hildanext.models.loading.weights_check import check_finite

MAGIC = b"GGUF"
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def load_gguf(
    path: Path, dtype: torch.dtype, device: str | torch.device, attention: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer out of one .gguf file. Raises `ModelError` for a broken or unsupported one."""
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise ModelError(f"{str(path)!r} is not a GGUF file", "give a safetensors folder, or a whole .gguf file")
    where: dict[str, Any] = {"gguf_file": path.name}
    try:
        facts = _facts(path)
        config = AutoConfig.from_pretrained(path.parent, **where)
        read_config(config.to_dict(), path)
        settings = {DTYPE: dtype, "attn_implementation": attention if attention is not None else install_seam()}
        with no_progress_bars():
            causal_lm = AutoModelForCausalLM.from_pretrained(path.parent, **where, **settings)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
    except ImportError:
        raise ModelError(f"reading {path.name} needs the gguf package", 'pip install "gguf>=0.10"') from None
    except (OSError, ValueError, KeyError, IndexError, RuntimeError) as problem:
        raise ModelError(f"cannot read {str(path)!r} ({first_line(problem)})", AGAIN) from None
    check_finite(causal_lm, path)
    if hasattr(causal_lm.config, "quantization_config"):
        del causal_lm.config.quantization_config  # the weights are plain now
    return causal_lm.to(device).eval(), _tokenizer(tokenizer, facts)


def _facts(path: Path) -> dict[str, Any]:
    """The scalar tokenizer fields of the file."""
    from gguf import GGUFReader

    prefix = "tokenizer.ggml."
    fields = GGUFReader(str(path)).fields
    return {
        name.removeprefix(prefix): field.parts[field.data[0]].tolist()[0]
        for name, field in fields.items()
        if name.startswith(prefix) and len(field.data) == 1
    }


def _tokenizer(converted: PreTrainedTokenizerBase, facts: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The converted tokenizer with the file's own special tokens.

    Transformers 4.51 guesses them by the architecture: it would end SmolLM2's texts with its BOS and begin
    every text with one, which the file forbids.
    """
    backend = getattr(converted, "backend_tokenizer", None)
    if backend is None:
        return converted
    roles = {
        role: converted.convert_ids_to_tokens(int(facts[f"{key}_token_id"]))
        for role, key in ROLES.items()
        if f"{key}_token_id" in facts
    }
    if not facts.get("add_bos_token", True):
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **roles)
    tokenizer.chat_template = converted.chat_template
    return tokenizer
