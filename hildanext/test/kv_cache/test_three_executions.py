"""One rule, `masks.may_attend`, and its three executions: dense, by blocks, and from the cache's slots."""

import pytest
import torch

from conftest import random_model
from hildanext import masks
from hildanext.kv_cache import BlockCache, CachedAttention, Segment
from hildanext.models.attention.blockwise import DoubledAttention
from hildanext.models.attention.dense import MaskedAttention

BLOCK, BLOCKS = 4, 4
LENGTH = BLOCK * BLOCKS


def of_training(model, noisy, clean):
    """Hidden states of the noisy copies and of the clean ones, dense and by blocks."""
    document, position = torch.zeros_like(clean), torch.arange(LENGTH)[None]
    both, places = torch.cat([noisy, clean], -1), torch.cat([position, position], -1)
    half = torch.arange(2 * LENGTH)[None] < LENGTH
    rows = masks.TokenRows(torch.cat([document, document], -1), places, half)
    contexts = (
        MaskedAttention(masks.doubled(document, position, BLOCK, model.card.clean_mask)),
        DoubledAttention.build(rows, LENGTH, BLOCK, model.card.clean_mask, model.dtype),
    )
    return [model(model.embed(both), places, context)[0].split(LENGTH) for context in contexts]


def of_decoding(model, noisy, clean):
    """The same from the cache: blocks are committed with the forward of the block behind them, one, two or all."""
    clean_states, noisy_states = torch.zeros(2, LENGTH, 32, dtype=model.dtype)
    cache = BlockCache.of(model, LENGTH)
    for begin, end in ((0, 0), (0, 1), (1, 3)):
        span = slice(begin * BLOCK, end * BLOCK)
        fed = torch.cat([clean[:, span], noisy[:, end * BLOCK : (end + 1) * BLOCK]], -1)
        context = CachedAttention([cache], [Segment(cache.length, span.stop - span.start, BLOCK)])
        hidden = model(model.embed(fed), context.positions, context)[0]
        cache.commit(span.stop)
        clean_states[span], noisy_states[span.stop : span.stop + BLOCK] = hidden[:-BLOCK], hidden[-BLOCK:]
    return noisy_states, clean_states


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("alignment", ["block", "parent"])
@torch.no_grad()
def test_the_three_executions_of_the_rule_are_equal(family, alignment):
    """Dense, by blocks and cached agree to 1e-9 in fp64 wherever decoding asks: noisy blocks 0, 1, 3, clean 0 to 2."""
    model = random_model(family, alignment, BLOCK)
    draw = torch.Generator().manual_seed(1)
    clean = torch.randint(0, model.card.vocab_real, (1, LENGTH), generator=draw)
    noisy = clean.masked_fill(torch.rand(clean.shape, generator=draw) < 0.5, model.card.mask_id)
    dense, blockwise = of_training(model, noisy, clean)
    cached = of_decoding(model, noisy, clean)
    asked = torch.tensor([0, 1, 3])[:, None] * BLOCK + torch.arange(BLOCK)
    for kind, places in ((0, asked.flatten()), (1, torch.arange(3 * BLOCK))):
        for other in (blockwise, cached):
            torch.testing.assert_close(other[kind][places], dense[kind][places], atol=1e-9, rtol=0)
