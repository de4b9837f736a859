"""The start of a conversion: an autoregressive model under a new card, untrained; its tokenizer as the data is."""

from collections.abc import Collection
from pathlib import Path

import torch
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from hildanext.core.config import config
from hildanext.core.errors import ConfigError
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.card import Alignment, Card, alignment_fields
from hildanext.models.loading.files import weights_hash
from hildanext.models.loading.load import load_diffusion, load_parent
from hildanext.models.loading.names import locate, locate_diffusion
from hildanext.models.lora import LoraConfig, add_lora
from hildanext.models.quantize import Quantize, place
from hildanext.tokenization import never_ids, resolve_mask_id


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


@config
class ParentConfig:
    """An autoregressive parent to train directly, where no conversion went before."""

    name: str
    alignment: Alignment = "block"
    block_size: int = Field(default=32, ge=1)
    trust_remote_code: bool = False


def start_tuning(
    start: str | ParentConfig, device: torch.device, lora: LoraConfig | None = None, quantize: Quantize | None = None
) -> tuple[DiffusionModel, PreTrainedTokenizerBase]:
    """The model that a later stage trains, in fp32 on `device`, with its adapters: a diffusion checkpoint by name or
    folder, or a parent. Raises `ModelError`, `CheckpointError` or `ConfigError`."""
    if isinstance(start, str):
        model, tokenizer = load_diffusion(start, torch.float32, device, quantize)
    else:
        model, tokenizer = start_conversion(
            start.name, start.alignment, start.block_size, torch.float32, device,
            lora is not None, start.trust_remote_code, quantize,
        )  # fmt: skip
    if lora is not None:
        add_lora(model, lora)
    return model, tokenizer


def start_hash(start: str | ParentConfig) -> str:
    """Of the weights that `start_tuning` would load."""
    return weights_hash(locate_diffusion(start) if isinstance(start, str) else locate(start.name))


def adopt_edges(
    model: DiffusionModel, tokenizer: PreTrainedTokenizerBase, edges: Collection[tuple[int | None, int]]
) -> None:
    """Make the tokenizer begin and end texts as the data does, so that what is generated begins as training did.

    `edges` are the (BOS, EOS) ids of the data sets; BOS None means that documents begin with their text. Raises
    `ConfigError` where they differ, or where a tokenizer could not tell them from text.
    """
    if len(set(edges)) != 1:
        raise ConfigError(
            f"the data sets differ in how documents begin and end: BOS and EOS {sorted(set(edges), key=str)}",
            "prepare them with the same bos_token, eos_token and add_bos",
        )
    [(bos, eos)] = set(edges)
    if model.banned[eos]:
        raise ConfigError(
            f"the data ends its documents with {_token(tokenizer, eos)!r}, which is padding and is never generated",
            "prepare it with another eos_token",
        )
    if bos != tokenizer.bos_token_id:
        tokenizer.bos_token = None if bos is None else _marker(tokenizer, bos)
    if eos != tokenizer.eos_token_id:
        tokenizer.eos_token = _marker(tokenizer, eos)


def _marker(tokenizer: PreTrainedTokenizerBase, index: int) -> str:
    token = _token(tokenizer, index)
    if index not in tokenizer.added_tokens_decoder:
        raise ConfigError(
            f"the data begins or ends its documents with {token!r}, an ordinary word of this tokenizer",
            "prepare it with a special token as bos_token and eos_token",
        )
    return token


def _token(tokenizer: PreTrainedTokenizerBase, index: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(index))


def public_name(parent_name: str | Path) -> str:
    """A checkpoint travels: it names its parent, not the folder that its maker kept it in."""
    path = Path(parent_name)
    return path.resolve().name if path.exists() else str(parent_name)
