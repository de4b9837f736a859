"""Exports of small random drafters, for tests of what runs them."""

from pathlib import Path
from typing import Any

import torch

from hildanext.export.onnx_export import Source, write_source
from hildanext.export.smoothing import watched_peaks
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.card import Card, alignment_fields
from hildanext.models.draft_card import DraftCard
from hildanext.models.drafter import Drafter
from hildanext.models.gated_lora import GatedLoraConfig
from hildanext.runtimes.drawn_blocks import drawn_blocks
from hildanext.runtimes.onnx_blocks import OnnxDiffusion
from hildanext.runtimes.onnx_network import OnnxNetwork, skeleton
from small_models import small_causal, small_tokenizer

PLACES = 3


def small_source(family: str = "qwen3", enter: int = 0, sampler: int | None = None,
                 vocabulary: int | None = None, **changes: Any) -> Source:  # fmt: skip
    """A drafter whose adapters say something, right or wrong."""
    lora = GatedLoraConfig(rank=4)
    causal_lm = small_causal(family, **changes)
    drafter = Drafter(causal_lm, lora, PLACES, enter, sampler=sampler, vocabulary=vocabulary)
    if drafter.draft_tokens is not None:
        drafter.draft_tokens.mul_(2)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in drafter.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    card = DraftCard(
        parent="small", parent_hash="0", places=PLACES, enter=enter, sampler=sampler, vocabulary=vocabulary, lora=lora
    )
    return Source(drafter.eval(), causal_lm, small_tokenizer(), card)


def small_network(folder: Path, source: Source, precision: Any) -> OnnxNetwork:
    card = write_source(source, folder, precision, "small", "0")
    return OnnxNetwork(folder, card, skeleton(folder), 1)


def small_blocks(family: str = "qwen3", alignment: Any = "block", block_size: int = 4, **changes: Any) -> Source:
    """A diffusion model whose last rows are a mask, unused ones and one that may never be said."""
    causal_lm = small_causal(family, **{"max_position_embeddings": 256, **changes})
    card = Card(
        mask_id=60, vocab_rows=64, vocab_real=60, block_size=block_size, never=(5,), parent="small",
        **alignment_fields(alignment),
    )  # fmt: skip
    model = DiffusionModel(causal_lm, card).eval()
    return Source(causal_lm, causal_lm, small_tokenizer(), None, model)


def small_exported_blocks(folder: Path, source: Source, precision: Any) -> OnnxDiffusion:
    assert source.diffusion is not None
    with watched_peaks(source.causal_lm) as peaks:
        drawn_blocks(source.diffusion, source.tokenizer)
    card = write_source(source, folder, precision, "small", "0", peaks)
    assert card.diffusion is not None
    return OnnxDiffusion(OnnxNetwork(folder, card, skeleton(folder), 1), card.diffusion).eval()
