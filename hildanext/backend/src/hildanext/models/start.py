"""The start of a conversion: an autoregressive model under a new card, untrained."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from hildanext.core.errors import ModelError
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.card import Alignment, Card, alignment_fields
from hildanext.models.loading.load import load_parent
from hildanext.models.quantize import Quantize, place
from hildanext.tokenization import never_ids, resolve_mask_id, same_words


def start_conversion(
    parent_name: str | Path,
    alignment: Alignment = "parent",
    block_size: int = 32,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    mask_delta: bool = False,
    trust_remote_code: bool = False,
    quantize: Quantize | None = None,
) -> tuple[DiffusionModel, PreTrainedTokenizerBase]:
    """Load a parent, give it a mask token and a card. Raises `ModelError` where the parent cannot be had.

    The tokenizer returned knows the mask token. Real tokens keep the parent's logits exactly, or those of its 4-bit
    weights with `quantize` (which raises `ConfigError`, see `quantize.bitsandbytes_on`).
    """
    causal_lm, tokenizer = load_parent(parent_name, dtype, device, trust_remote_code, as_stored=quantize is not None)
    place(causal_lm, dtype, device, quantize)  # first, so that the mask's row is computed in `dtype`
    never = never_ids(tokenizer, causal_lm)
    mask_id, vocab_real = resolve_mask_id(tokenizer, causal_lm)
    card = Card(
        mask_id=mask_id,
        vocab_rows=causal_lm.get_input_embeddings().weight.shape[0],
        vocab_real=vocab_real,
        block_size=block_size,
        parent=public_name(parent_name),
        never=tuple(index for index in never if index != mask_id),
        **alignment_fields(alignment),  # type: ignore[arg-type]
    )
    return DiffusionModel(causal_lm, card, mask_delta).to(device), tokenizer


def open_beside(
    parent_name: str | Path,
    model: DiffusionModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> tuple[DiffusionModel, PreTrainedTokenizerBase]:
    """A parent under `model`'s card, on its device, to be compared with it token by token.

    Raises `ModelError` for one with other rows or other words: the same ids would be another text to it.
    """
    card = model.card
    frozen, words = start_conversion(
        parent_name, card.alignment, card.block_size, dtype, model.device, trust_remote_code=trust_remote_code
    )
    rows = frozen.card.vocab_rows
    if rows != card.vocab_rows or not same_words(words, tokenizer):
        what = f"has {rows} rows, the checkpoint {card.vocab_rows}" if rows != card.vocab_rows else "has other tokens"
        raise ModelError(
            f"the parent {str(parent_name)!r} {what}", "name the parent that this checkpoint was converted from"
        )
    return frozen, words


def public_name(parent_name: str | Path) -> str:
    """A checkpoint travels: it names its parent, not the folder that its maker kept it in."""
    path = Path(parent_name)
    return path.resolve().name if path.exists() else str(parent_name)
