"""Text that a diffusion model itself draws, and what it says of masks in it: what an export is measured on."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hildanext.core.errors import PromptError
from hildanext.core.runtime import make_generator
from hildanext.decoding.base import run
from hildanext.decoding.sequence import SequenceState
from hildanext.decoding.state import DecodeState
from hildanext.decoding.threshold_edit import ThresholdEdit
from hildanext.export.smoothing import DOCUMENTS, TOKENS
from hildanext.kv_cache import BlockCache, CachedAttention, Segment
from hildanext.models.bidirectional import DiffusionModel

DECODER = ThresholdEdit(tau_mask=0.3, tau_edit=None, max_post=0, temperature=1.0)


@torch.inference_mode()
def drawn_blocks(model: DiffusionModel, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> list[list[int]]:
    """A few documents of whole blocks, two at least where the context has room. Raises `PromptError` where the
    tokenizer has no first token to draw from."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise PromptError("the tokenizer has neither BOS nor EOS", "documents cannot be drawn without a first token")
    size, context = model.card.block_size, int(model.causal_lm.config.max_position_embeddings)
    length = min(max(TOKENS // size, 2), context // size) * size
    documents: list[list[int]] = []

    def ended(row: SequenceState, tokens: list[int]) -> bool:
        if row.start >= length:
            documents.append(tokens)
        return row.start >= length

    seeds = range(seed * DOCUMENTS, (seed + 1) * DOCUMENTS)
    state = DecodeState(model, [[first]] * DOCUMENTS, [length] * DOCUMENTS, ended, seeds=seeds)
    state.prefill()
    run(DECODER, state)
    return documents


@torch.inference_mode()
def masked_logits(model: DiffusionModel, document: list[int], seed: int = 0) -> tuple[Tensor, list[int]]:
    """Logits of masks in every block, half of it masked, behind the blocks before it; and the tokens that stand there.

    The first token of a document is never masked.
    """
    card, found, targets = model.card, list[Tensor](), list[int]()
    whole = torch.tensor([document], device=model.device)
    masked = torch.rand(len(document), generator=make_generator(seed)) < 0.5
    for start in range(0, len(document), card.block_size):
        end = start + card.block_size
        places = [place for place in range(max(start, 1), end) if masked[place]]
        if not places:
            continue
        fed = whole[:, :end].clone()
        fed[0, places] = card.mask_id
        context = CachedAttention([BlockCache.of(model, end)], [Segment(0, start, card.block_size)])
        hidden = model.hidden(fed, context.positions, context)[0]
        shift = 1 if card.shift == "left" else 0
        found.append(model.logits(hidden[[place - shift for place in places]]))
        targets += [document[place] for place in places]
    return torch.cat(found) if found else torch.zeros(0, card.vocab_rows), targets
