"""What a stage after the conversion trains: a diffusion checkpoint or a parent, with its adapters; and its hash."""

import torch
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from hildanext.core.config import config
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.card import Alignment
from hildanext.models.loading.files import weights_hash
from hildanext.models.loading.load import load_diffusion
from hildanext.models.loading.names import locate, locate_diffusion
from hildanext.models.lora import LoraConfig, add_lora
from hildanext.models.quantize import Quantize
from hildanext.models.start import start_conversion


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
