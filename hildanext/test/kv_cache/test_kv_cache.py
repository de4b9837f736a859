"""The block cache: what a commit keeps, what an edit spoils, and that training sees what decoding sees."""

import pytest
import torch

from conftest import random_model
from hildanext import masks
from hildanext.corruption.input_layout import InputLayout
from hildanext.kv_cache import BlockCache, CachedAttention, Segment
from hildanext.models.attention.dense import MaskedAttention

FAMILIES = ["llama", "qwen2", "qwen3"]
ALIGNMENTS = ["block", "parent"]
BLOCK = 4


def tokens_of(model, count, seed):
    return torch.randint(0, model.card.vocab_real, (1, count), generator=torch.Generator().manual_seed(seed))


def feed(model, cache, tokens, clean, noisy):
    """One forward of the next `clean + noisy` tokens; commits the clean ones."""
    context = cache.context(clean, noisy)
    start = cache.length
    with torch.no_grad():
        hidden = model(model.embed(tokens[:, start : start + clean + noisy]), context.positions, context)
    cache.commit(start + clean, tokens[0])
    return hidden


def committed(model, tokens, debug=False):
    cache = BlockCache.of(model, tokens.shape[1], debug)
    feed(model, cache, tokens, tokens.shape[1], 0)
    return cache


def readout(position, shift):
    """Where a doubled forward predicts each token."""
    every = torch.arange(position.shape[1])[None]
    return InputLayout(every, every, position.shape[1]).prediction_index(position, BLOCK, shift)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_noisy_half_of_training_equals_the_cached_forward(family, alignment):
    """Training equals inference to 1e-9 in fp64, whether a block is committed before or with the forward."""
    for seed in range(9):
        model = random_model(family, alignment, BLOCK, seed=seed)
        clean = tokens_of(model, 4 * BLOCK, seed)
        hide = torch.rand(clean.shape, generator=torch.Generator().manual_seed(seed)) < 0.6
        noisy = clean.masked_fill(hide, model.card.mask_id)
        document, position = torch.zeros_like(clean), torch.arange(clean.shape[1])[None]
        mask = masks.doubled(document, position, BLOCK, model.card.clean_mask)
        both = torch.cat([noisy, clean], -1)
        with torch.no_grad():
            hidden = model(model.embed(both), torch.cat([position, position], -1), MaskedAttention(mask))
        index = readout(position, model.card.shift)
        trained = model.logits(hidden[0, index[0]])
        for block in range(1, 4):
            span = slice(block * BLOCK, (block + 1) * BLOCK)
            text = torch.cat([clean[:, : span.start], noisy[:, span]], -1)
            for before in (span.start, span.start - BLOCK, 0):
                cache = BlockCache.of(model, clean.shape[1])
                last = feed(model, cache, text, before, 0)[:, -1:] if before else None
                now = feed(model, cache, text, span.start - before, BLOCK)
                if model.card.shift == "left":
                    rows = now if last is None or span.start > before else torch.cat([last, now], 1)
                    read = rows[0, -BLOCK - 1 : -1]
                else:
                    read = now[0, -BLOCK:]
                torch.testing.assert_close(model.logits(read), trained[span], atol=1e-9, rtol=0)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_future_clean_and_other_noisy_blocks_do_not_matter(alignment):
    """Clean blocks from k on and noisy blocks other than k leave block k's logits alone."""
    model = random_model("llama", alignment, BLOCK)
    clean = tokens_of(model, 3 * BLOCK, 1)
    noisy = clean.clone()
    noisy[:, BLOCK : 2 * BLOCK] = model.card.mask_id
    position = torch.arange(clean.shape[1])[None]
    mask = masks.doubled(torch.zeros_like(clean), position, BLOCK, model.card.clean_mask)
    index = readout(position, model.card.shift)[0, BLOCK : 2 * BLOCK]

    def read(noisy, clean):
        with torch.no_grad():
            fed = model.embed(torch.cat([noisy, clean], -1))
            return model(fed, torch.cat([position, position], -1), MaskedAttention(mask))[0, index]

    other_clean, other_noisy = clean.clone(), noisy.clone()
    other_clean[:, BLOCK:] = 0
    other_noisy[:, 2 * BLOCK :] = 0
    other_noisy[:, :BLOCK] = 0
    assert torch.equal(read(noisy, clean), read(other_noisy, other_clean))


def differing(one, other):
    """For each layer the positions whose keys or values differ."""
    changed = []
    for layer in range(len(one.keys)):
        gap = sum((a - b).abs().sum((0, 2)) for a, b in zip(one.view(layer), other.view(layer), strict=True))
        changed.append(set((gap > 1e-9).nonzero()[:, 0].tolist()))
    return changed


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_of_the_revealing_forward_are_wrong(family):
    """One mask left in the input spoils every position of the block from layer 1 on."""
    for seed in range(17):
        model = random_model(family, "block", BLOCK, seed=seed)
        tokens = tokens_of(model, 2 * BLOCK, seed)
        right = committed(model, tokens)
        revealing = tokens.clone()
        revealing[0, 6] = model.card.mask_id
        wrong = BlockCache.of(model, 2 * BLOCK)
        feed(model, wrong, revealing, BLOCK, 0)
        feed(model, wrong, revealing, 0, BLOCK)
        wrong.length = 2 * BLOCK
        assert differing(right, wrong) == [{6}, {4, 5, 6, 7}, {4, 5, 6, 7}]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_clean_noisy_block_leaves_the_keys_of_a_commit(family):
    """Why "auto" needs no commit: under the block-causal rule the unchanged last forward is the commit."""
    model = random_model(family, "block", BLOCK)
    tokens = tokens_of(model, 2 * BLOCK, 3)
    noisy = BlockCache.of(model, 2 * BLOCK)
    feed(model, noisy, tokens, BLOCK, 0)
    feed(model, noisy, tokens, 0, BLOCK)
    noisy.length = 2 * BLOCK
    assert differing(committed(model, tokens), noisy) == [set(), set(), set()]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_an_edit_in_a_finished_block_spoils(family):
    """Of a change at position 6 in block 1 of 4, by layer. Token-causally it starts at the token itself."""
    for seed in range(17):
        for alignment, first in (("block", 4), ("parent", 6)):
            model = random_model(family, alignment, BLOCK, seed=seed)
            tokens = tokens_of(model, 4 * BLOCK, seed)
            edited = tokens.clone()
            edited[0, 6] = (edited[0, 6] + 1) % model.card.vocab_real
            later = set(range(first, 16))
            assert differing(committed(model, tokens), committed(model, edited)) == [{6}, later, later]


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_truncating_and_running_again_is_exact_and_a_stale_cache_is_not(alignment):
    """To 1e-9 over 60 seeds; the stale cache changes the argmax in a clear fraction of them."""
    changed = 0
    for seed in range(60):
        model = random_model(FAMILIES[seed % 3], alignment, BLOCK, seed=seed)
        tokens = tokens_of(model, 4 * BLOCK, seed)
        cache, stale = committed(model, tokens[:, :12], debug=True), committed(model, tokens[:, :12])
        cache = _grown(model, cache, 16)
        stale = _grown(model, stale, 16)
        edited = tokens.clone()
        edited[0, 5] = (edited[0, 5] + 1) % model.card.vocab_real
        edited[0, 12:] = model.card.mask_id
        with pytest.raises(AssertionError, match="stale"):
            cache.verify(edited[0])
        cache.truncate(4)
        cache.verify(edited[0])
        again = model.logits(feed(model, cache, edited, 8, BLOCK)[0, -BLOCK:])
        whole = BlockCache.of(model, 16)
        full = model.logits(feed(model, whole, edited, 12, BLOCK)[0, -BLOCK:])
        torch.testing.assert_close(again, full, atol=1e-9, rtol=0)
        old = model.logits(feed(model, stale, edited, 0, BLOCK)[0, -BLOCK:])
        changed += bool((old.argmax(-1) != full.argmax(-1)).any())
    assert changed > 12


def _grown(model, cache, capacity):
    """The same cache with room for more."""
    bigger = BlockCache.of(model, capacity, cache.debug)
    bigger.keys[:, :, : cache.capacity] = cache.keys
    bigger.values[:, :, : cache.capacity] = cache.values
    bigger.length, bigger._hashes = cache.length, cache._hashes
    return bigger


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_keys_of_later_blocks_do_not_reach_an_earlier_one(alignment):
    """Whatever the slots beyond the active block hold, its logits stay (mixed batches: the next test)."""
    model = random_model("qwen3", alignment, BLOCK)
    tokens = tokens_of(model, 4 * BLOCK, 5)
    outputs = []
    for noise in (0.0, 1e3):
        cache = BlockCache.of(model, 4 * BLOCK)
        feed(model, cache, tokens, BLOCK, 0)
        cache.keys[:, :, 3 * BLOCK :] = noise
        cache.values[:, :, 3 * BLOCK :] = noise
        outputs.append(feed(model, cache, tokens, BLOCK, BLOCK))
    assert torch.equal(*outputs)


def test_documents_of_different_lengths_share_a_forward():
    """Each document attends to its own prefix, whatever its neighbours feed and its other slots hold."""
    for alignment in ALIGNMENTS:
        model = random_model("llama", alignment, BLOCK)
        rows = [tokens_of(model, 16, 1)[0], tokens_of(model, 16, 2)[0]]
        caches = [BlockCache.of(model, 16) for _ in rows]
        for cache in caches:
            cache.keys.normal_(), cache.values.normal_()
        for segments in ([Segment(0, 8, 0), Segment(0, 4, BLOCK)], [Segment(8, 4, BLOCK), Segment(4, 0, BLOCK)]):
            context = CachedAttention(caches, segments)
            fed = torch.cat(
                [tokens[segment.start : segment.end] for tokens, segment in zip(rows, segments, strict=True)]
            )[None]
            with torch.no_grad():
                hidden = model(model.embed(fed), context.positions, context)[0].split(
                    [segment.num_tokens for segment in segments]
                )
            for cache, segment in zip(caches, segments, strict=True):
                cache.commit(segment.start + segment.clean)
        for row, (first, second) in enumerate(((8, 4), (4, 0))):
            alone = BlockCache.of(model, 16)
            feed(model, alone, rows[row][None], first, 0)
            single = feed(model, alone, rows[row][None], second, BLOCK)
            torch.testing.assert_close(hidden[row], single[0], atol=1e-9, rtol=0)
            torch.testing.assert_close(caches[row].view(2)[0], alone.view(2)[0], atol=1e-9, rtol=0)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_blocks_taken_over_from_a_document_with_the_same_beginning_are_exact(alignment):
    model = random_model("qwen3", alignment, BLOCK)
    tokens, other = tokens_of(model, 16, 1), tokens_of(model, 16, 1)
    other[0, 8:] = 3
    cache = BlockCache.of(model, 16, debug=True)
    cache.adopt(committed(model, other, debug=True), 8, tokens[0])
    cache.verify(tokens[0])
    ours, theirs = feed(model, cache, tokens, 4, BLOCK), BlockCache.of(model, 16)
    feed(model, theirs, tokens, 8, 0)
    torch.testing.assert_close(ours, feed(model, theirs, tokens, 4, BLOCK), atol=1e-9, rtol=0)


def test_views_are_not_copies():
    model = random_model("llama", "block", BLOCK)
    cache = committed(model, tokens_of(model, 8, 0))
    keys, values = cache.view(0)
    assert keys.data_ptr() == cache.keys.data_ptr() and keys.shape == (2, 8, 8)
    assert values.untyped_storage().data_ptr() == cache.values.untyped_storage().data_ptr()
