"""Small noised batches, and what a model predicts of them by the dense mask, the slow way that is surely right."""

from dataclasses import replace

import torch

from hildanext import masks
from hildanext.corruption.input_layout import InputLayout, build_layout, layout_of
from hildanext.diffusion import NoisedBatch, block_index, block_times, mask_tokens, replace_tokens
from hildanext.models.attention.dense import MaskedAttention

MASK = 61

Row = list[list[int]]
"""Documents of a batch row, each as lengths of prompt, answer, prompt, answer, ..."""


def make_view(length=16, batch=2, block=4, t=None, seed=0, documents=None) -> NoisedBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, MASK, (batch, length), generator=generator)
    document = torch.zeros(batch, length, dtype=torch.long)
    position = torch.arange(length).repeat(batch, 1)
    if documents is not None:
        document = torch.tensor([documents]).repeat(batch, 1)
        counts: dict[int, int] = {}
        row = []
        for number in documents:
            row.append(counts.get(number, 0) if number >= 0 else 0)
            counts[number] = counts.get(number, 0) + 1
        position = torch.tensor([row]).repeat(batch, 1)
    blocks = block_index(document, position, block)
    time = block_times(blocks, (0.2, 1.0), generator) if t is None else torch.full(blocks.shape, t)
    return mask_tokens(tokens, document, position, document >= 0, time.double(), block, MASK, generator)


def answers(rows: list[Row], block: int = 4, seed: int = 0) -> NoisedBatch:
    """A noised view of documents of prompts and answers; only answers are maskable, rows are padded at the end."""
    generator = torch.Generator().manual_seed(seed)
    seq = max(sum(map(sum, row)) for row in rows)
    document, position = torch.full((len(rows), seq), -1), torch.zeros(len(rows), seq, dtype=torch.long)
    maskable = torch.zeros(len(rows), seq, dtype=torch.bool)
    for index, row in enumerate(rows):
        at = 0
        for number, spans in enumerate(row):
            document[index, at : at + sum(spans)] = number
            position[index, at : at + sum(spans)] = torch.arange(sum(spans))
            for turn, span in enumerate(spans):
                maskable[index, at : at + span] = turn % 2 == 1
                at += span
    tokens = torch.randint(0, MASK, (len(rows), seq), generator=generator)
    time = block_times(block_index(document, position, block), (0.3, 0.8), generator).double()
    view = mask_tokens(tokens, document, position, maskable, time, block, MASK, generator)
    return replace_tokens(view, 0.5, torch.arange(MASK), generator)


def model_input(view: NoisedBatch, fed: InputLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and positions of a forward."""
    return fed.tokens(view), fed.rows(view).position


def noisy_logits(model, view):
    """Logits of every token's prediction, [batch seq vocab], by the dense mask."""
    layout = layout_of(view.block_size, view.clean.shape[1], model.card.shift)
    fed = build_layout(view, layout)
    tokens, positions = model_input(view, fed)
    if layout == "double":
        mask = masks.doubled(view.document, view.position, view.block_size, model.card.clean_mask)
    elif layout == "single":
        mask = masks.same_document(view.document)
    else:
        mask = masks.clean_only(view.document, view.position, view.block_size, model.card.clean_mask)
    hidden = model(model.embed(tokens), positions, MaskedAttention(mask))
    index = fed.prediction_index(view.position, view.block_size, model.card.shift)
    return model.logits(hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1])))


def right_at_the_end(model, view: NoisedBatch) -> NoisedBatch:
    """The view whose truth in the last block, which no prediction sees, is what the model predicts."""
    best = noisy_logits(model, view).argmax(-1)
    last = view.position // view.block_size == view.position.max() // view.block_size
    clean = torch.where(last & view.masked, best, view.clean)
    return replace(view, clean=clean, noisy=torch.where(view.masked, view.noisy, clean))
