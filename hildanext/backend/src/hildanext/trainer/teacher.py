"""The frozen autoregressive parent beside a model that learns: its hidden states of the clean text."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hildanext.ar import Parent
from hildanext.core.runtime import accelerates_bf16
from hildanext.diffusion import NoisedBatch
from hildanext.losses import TokenLoss
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.lora import without_lora
from hildanext.models.start import open_beside


def teacher_for(
    losses: Iterable[TokenLoss],
    model: DiffusionModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str | Path,
    precision: str,
    parent_is_base_model: bool,
    trust_remote_code: bool = False,
) -> Parent | None:
    """The frozen parent, where a loss asks for one. `parent_is_base_model`: the model with its adapters off is that
    parent; else the parent called `name` is loaded beside it. Raises `ModelError`."""
    if not any(loss.needs_parent for loss in losses):
        return None
    return (
        Parent(model.causal_lm, None, model.banned)
        if parent_is_base_model
        else frozen_parent(name, model, tokenizer, precision, trust_remote_code)
    )


def frozen_parent(
    name: str | Path,
    model: DiffusionModel,
    tokenizer: PreTrainedTokenizerBase,
    precision: str,
    trust_remote_code: bool = False,
) -> Parent:
    """A second copy of the parent, with the rows of `model`'s embedding, on its device. Raises `ModelError`."""
    # Autocast would compute the parent in this dtype anyway; stored in it, no weight is cast again and again.
    dtype = torch.bfloat16 if precision != "no" and accelerates_bf16(model.device) else torch.float32
    frozen, words = open_beside(name, model, tokenizer, dtype, trust_remote_code)
    frozen.requires_grad_(False)
    return Parent(frozen.causal_lm, words, frozen.banned)


def reader(teacher: Parent | None, model: DiffusionModel) -> Callable[[NoisedBatch], Tensor] | None:
    """View -> the parent's hidden states of its clean tokens, for `TrainingTask.teacher`."""
    if teacher is None:
        return None

    def read(view: NoisedBatch) -> Tensor:
        clean, document, position = (
            part.to(teacher.device, non_blocking=True) for part in (view.clean, view.document, view.position)
        )
        if teacher.causal_lm is not model.causal_lm:
            return teacher.hidden(clean, document, position)
        with without_lora(model):
            return teacher.hidden(clean, document, position)

    return read
