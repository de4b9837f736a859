"""LoRA inside a diffusion model: frozen weights, small trainable factors, and the mask's own vector."""

import contextlib
from collections.abc import Iterator

from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import Field

from hildanext.core.config import config
from hildanext.models.bidirectional import DiffusionModel


@config
class LoraConfig:
    """Low-rank adapters on the linear layers; embeddings and head stay frozen but for the mask's vector."""

    rank: int = Field(default=32, ge=1)
    alpha: float = Field(default=64.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_lora(model: DiffusionModel, lora: LoraConfig) -> None:
    """Freeze the model and put adapters into it, in place. `model.mask_delta`, where there is one, stays trainable."""
    for parameter in model.causal_lm.parameters():
        parameter.requires_grad_(False)
    config = PeftLoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets), bias="none"
    )
    inject_adapter_in_model(config, model.causal_lm)


@contextlib.contextmanager
def without_lora(model: DiffusionModel) -> Iterator[None]:
    """Within the context the model computes as its frozen parent."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
