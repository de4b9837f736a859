"""From a name or a path to a model: the autoregressive parents and the diffusion checkpoints.

Weights come from safetensors or GGUF only. Nothing falls back to another model: what cannot be had is a `ModelError`.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from hildanext.core.errors import CheckpointError, ModelError
from hildanext.models.attention.dense import install_seam
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.card import read_card
from hildanext.models.loading import names
from hildanext.models.loading.files import (
    AGAIN,
    DTYPE,
    check_folder,
    first_line,
    no_progress_bars,
    refuse_diffusion,
    stored_dtype,
    weight_files,
)
from hildanext.models.loading.gguf_file import load_gguf
from hildanext.models.loading.model_config import read_config, read_rope
from hildanext.models.loading.weights_check import check_finite, heads_differ
from hildanext.models.quantize import Quantize
from hildanext.models.quantize import place as put_in_place
from hildanext.tokenization import check_words, load_tokenizer


def load_parent(
    name: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    attention: str | None = None,
    as_stored: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An autoregressive model and its tokenizer, by name (`models/loading/names.py`), folder, hub id or .gguf file.

    The model attends through the seam, unless `attention` names one of Transformers' own. `as_stored` leaves the
    weights on the CPU in the type of the files (fp32 from GGUF), for `quantize.place`. Raises `ModelError`.
    """
    place = names.locate(str(name))
    if place.is_file():
        return load_gguf(place, torch.float32 if as_stored else dtype, "cpu" if as_stored else device, attention)
    refuse_diffusion(place)
    causal_lm = _load_folder(place, None if as_stored else dtype, device, trust_remote_code, attention)
    tokenizer = load_tokenizer(place, trust_remote_code)
    # Tokens that somebody added, as padding, are often one more than the rows: no text holds them.
    check_words(tokenizer, causal_lm.get_input_embeddings().weight.shape[0], place, added=False)
    return causal_lm, tokenizer


def load_diffusion(
    name: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    quantize: Quantize | None = None,
) -> tuple[DiffusionModel, PreTrainedTokenizerBase]:
    """A diffusion checkpoint (a folder with `hilda.json`, or `tiny`) and its tokenizer.

    With `quantize` its linear layers are put in 4 bits, to carry adapters. Raises `ModelError`, or `CheckpointError`
    where the card is missing or does not fit the weights, or `ConfigError` (see `quantize.bitsandbytes_on`).
    """
    place = names.locate_diffusion(str(name))
    card = read_card(place)
    causal_lm = _load_folder(place, None if quantize is not None else dtype, device, False, None)
    rows = causal_lm.get_input_embeddings().weight.shape[0]
    if rows != card.vocab_rows:
        raise CheckpointError(
            f"{str(place)!r}: the card says {card.vocab_rows} rows and mask {card.mask_id}, the weights have {rows}",
            "card and weights are of different checkpoints; copy both again",
        )
    context = causal_lm.config.max_position_embeddings
    if card.block_size > context:
        raise CheckpointError(
            f"{str(place)!r}: the card says blocks of {card.block_size}, the model reads {context} tokens",
            "card and weights are of different checkpoints; copy both again",
        )
    tokenizer = load_tokenizer(place)
    check_words(tokenizer, rows, place)
    if tokenizer.mask_token_id != card.mask_id:
        raise CheckpointError(
            f"{str(place)!r}: the card says mask {card.mask_id}, the tokenizer's is {tokenizer.mask_token_id}",
            "card and tokenizer are of different checkpoints; copy both again",
        )
    if quantize is not None:
        put_in_place(causal_lm, dtype, device, quantize)
    return DiffusionModel(causal_lm, card).eval(), tokenizer


def _load_folder(
    folder: Path, dtype: torch.dtype | None, device: str | torch.device, trust_remote_code: bool, attention: str | None
) -> PreTrainedModel:
    """`dtype` None: on the CPU, in the type of the files."""
    fields = check_folder(folder, trust_remote_code)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True) if trust_remote_code else None
    config = config if config is not None else read_config(fields, folder)
    read_rope(config, fields)
    if getattr(config, "sliding_window", None) is not None:
        config.sliding_window = None  # unused (`check_folder` refuses models that use it), but 4.51 warns of it
    if config.tie_word_embeddings and heads_differ(weight_files(folder)):
        config.tie_word_embeddings = False  # Transformers 4.x would put the embedding in the head's place
    settings: dict[str, Any] = {
        DTYPE: dtype if dtype is not None else stored_dtype(folder),
        "config": config,
        "attn_implementation": attention if attention is not None else install_seam(),
        "use_safetensors": True,
        "trust_remote_code": trust_remote_code,
        "output_loading_info": True,
    }
    try:
        with no_progress_bars():
            causal_lm, report = AutoModelForCausalLM.from_pretrained(folder, **settings)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError, ArithmeticError) as problem:
        raise ModelError(f"cannot load {str(folder)!r} ({first_line(problem)})", AGAIN) from None
    missing = sorted(report["missing_keys"])
    if missing:  # Transformers would go on with random numbers in their place
        raise ModelError(f"{str(folder)!r} lacks {len(missing)} weights ({missing[0]})", AGAIN)
    check_finite(causal_lm, folder)
    return causal_lm.to(device if dtype is not None else "cpu").eval()
