"""The frozen reference of a training with residual inputs, and what of it a resumed run must find again."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hildanext.core.errors import ModelError
from hildanext.core.runtime import accelerates_bf16
from hildanext.losses.residual_inputs import ResidualConfig, ResidualInputs
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.loading.files import weights_hash
from hildanext.models.loading.load import load_diffusion
from hildanext.models.loading.names import locate_diffusion
from hildanext.tokenization import same_words
from hildanext.trainer.config import TrainConfig


def residual_inputs(
    settings: ResidualConfig | None,
    model: DiffusionModel,
    tokenizer: PreTrainedTokenizerBase,
    train: TrainConfig,
    adapted: bool,
) -> ResidualInputs | None:
    """What mixes the inputs of a run whose `model` is as it starts; None without `settings`.

    Without a reference that is named it is that start: with adapters (`adapted`) the weights under them, else a copy.
    Raises `ModelError` for a reference that reads other tokens or in another way.
    """
    if settings is None:
        return None
    if settings.reference is None and adapted:
        return ResidualInputs(model, settings, train.chunk)
    # Autocast would compute in this dtype anyway; stored in it, no weight is cast again and again.
    dtype = torch.bfloat16 if train.precision != "no" and accelerates_bf16(model.device) else torch.float32
    if settings.reference is None:
        reference = copy.deepcopy(model).to(dtype)
    else:
        reference, words = load_diffusion(settings.reference, dtype, model.device)
        _check_reference(settings.reference, reference, words, model, tokenizer)
    reference.requires_grad_(False)
    return ResidualInputs(reference.eval(), settings, train.chunk)


def _check_reference(
    name: str,
    reference: DiffusionModel,
    words: PreTrainedTokenizerBase,
    model: DiffusionModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    ours, theirs = model.card, reference.card
    facts = ("vocab_rows", "mask_id", "alignment")
    other = next((fact for fact in facts if getattr(ours, fact) != getattr(theirs, fact)), None)
    if other is not None:
        what = f"has {other} {getattr(theirs, other)}, what is trained {getattr(ours, other)}"
    elif not same_words(words, tokenizer):
        what = "has other tokens than what is trained"
    else:
        return
    raise ModelError(
        f"the reference {name!r} of the residuals {what}", "name a checkpoint of the same parent and alignment, or none"
    )


def reference_hash(settings: ResidualConfig | None) -> str | None:
    """Of the weights of a reference that is named."""
    named = settings is not None and settings.reference is not None
    return weights_hash(locate_diffusion(str(settings.reference))) if settings is not None and named else None


def with_reference(section: dict[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's comparable section: where the reference's weights lie does not matter, what they are does."""
    if section.get("residual") is None:
        return section
    kept = {key: value for key, value in section["residual"].items() if key != "reference"}
    return {**section, "residual": {**kept, "reference (hash of the weights)": record.get("reference")}}
