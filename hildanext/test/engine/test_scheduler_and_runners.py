"""What the engine is made of: turns, kept prefixes, rows with decoders of their own, the parent's stream."""

import pytest
import torch

from conftest import random_model
from decoding_stubs import StubTokenizer
from hildanext.decoding import decoder_section, make_decoder
from hildanext.decoding.detokenizer import IncrementalDetokenizer
from hildanext.decoding.per_row import PerRow, _part
from hildanext.decoding.state import DecodeState
from hildanext.engine.base import Overloaded
from hildanext.engine.scheduler import Admission, Schedulable, Scheduler
from hildanext.kv_cache import BlockCache
from hildanext.kv_cache.prefix_cache import PrefixCache

BLOCK = 4


def admitted(scheduler, judge=lambda item: Admission.GO):
    items = []
    while (item := scheduler.admit(judge)) is not None:
        items.append(item)
    return items


def test_places_are_given_in_order_and_the_queue_is_bounded():
    scheduler: Scheduler[Schedulable] = Scheduler(slots=2, queue=1, quantum=3)
    items = [Schedulable() for _ in range(4)]
    for item in items[:3]:
        scheduler.enqueue(item)
    with pytest.raises(Overloaded, match="queue holds 1"):
        scheduler.enqueue(items[3])
    assert admitted(scheduler) == items[:2] and list(scheduler.waiting) == [items[2]]
    scheduler.remove(items[0])
    scheduler.enqueue(items[3])
    assert admitted(scheduler) == [items[2]]


def test_a_turn_ends_only_where_somebody_waits():
    scheduler: Scheduler[Schedulable] = Scheduler(slots=2, queue=9, quantum=3)
    first, second, third = Schedulable(), Schedulable(), Schedulable()
    scheduler.enqueue(first), scheduler.enqueue(second)
    admitted(scheduler)
    first.blocks, second.blocks = 9, 5
    assert scheduler.preempt() == []
    scheduler.enqueue(third)
    assert scheduler.preempt() == [first], "one waits, so one gives its place: the one that had it longest"
    assert admitted(scheduler) == [third]
    third.blocks = 2
    assert scheduler.preempt() == [second] and admitted(scheduler) == [first]
    assert first.blocks == 0, "its next turn is a whole one"


def test_who_rests_takes_no_place_in_the_queue():
    scheduler: Scheduler[Schedulable] = Scheduler(slots=1, queue=1, quantum=1)
    first, second = Schedulable(), Schedulable()
    scheduler.enqueue(first)
    admitted(scheduler)
    scheduler.enqueue(second)
    first.blocks = 1
    scheduler.preempt()
    admitted(scheduler)
    scheduler.enqueue(Schedulable())
    assert len(scheduler.waiting) == 2


def test_nobody_passes_a_request_that_waits_for_memory_but_those_that_hold_some():
    scheduler: Scheduler[Schedulable] = Scheduler(slots=3, queue=9, quantum=1)
    rests, large, small = Schedulable(begun=True), Schedulable(), Schedulable()
    for item in (large, small, rests):
        scheduler.waiting.append(item)
    assert admitted(scheduler, lambda item: Admission.STOP if item is large else Admission.GO) == [rests]
    assert admitted(scheduler, lambda item: Admission.LATER if item is large else Admission.GO) == [small]


def filled(model, tokens):
    """A cache that holds all of `tokens`, and its boundary."""
    session = DecodeState(model, [tokens], [len(tokens) + 1], lambda *_: False)
    with torch.no_grad():
        session.prefill()
    row = session.rows[0]
    assert row.cache is not None
    return row.cache, row.last_clean_hidden


def test_the_longest_common_beginning_is_found_and_only_whole_blocks_of_it():
    model = random_model("llama", "block", BLOCK)
    store = PrefixCache(BLOCK, 1 << 20)
    cache, last_clean_hidden = filled(model, list(range(12)))
    store.keep(cache, last_clean_hidden, list(range(12)))
    assert store.find([0, 1, 2]) is None and store.find([9, *range(1, 12)]) is None
    for tokens, length in ((range(12), 12), (range(11), 8), ([*range(7), 50, 8, 9], 4), (range(5), 4)):
        hit = store.find(list(tokens))
        assert hit is not None and hit[1] == length
        torch.testing.assert_close(hit[0].cache.keys[:, :, :length], cache.keys[:, :, :length], atol=0, rtol=0)


def test_a_kept_prefix_holds_no_more_than_what_was_committed_and_the_oldest_goes_first():
    model = random_model("llama", "block", BLOCK)
    documents = [[start, *range(7)] for start in (10, 20, 30)]
    block_bytes = 8 * 2 * 3 * 2 * 8 * 8  # tokens, keys and values, layers, heads, head_dim, bytes
    store = PrefixCache(BLOCK, 2 * block_bytes)
    for document in documents[:2]:
        store.keep(*filled(model, document), document)
    assert store.bytes == 2 * block_bytes
    assert store.find(documents[0]) is not None  # used: the other is the oldest now
    store.keep(*filled(model, documents[2]), documents[2])
    assert store.find(documents[1]) is None and store.find(documents[0]) and store.find(documents[2])
    assert store.bytes == 2 * block_bytes
    store.shrink(0)
    assert (store.bytes, len(store)) == (0, 0) and store.find(documents[0]) is None


def test_a_document_that_lives_lends_its_beginning_until_it_ends():
    model = random_model("llama", "block", BLOCK)
    store = PrefixCache(BLOCK, 0)
    cache, last_clean_hidden = filled(model, list(range(8)))
    key = store.register_live(cache, last_clean_hidden, list(range(8)))
    hit = store.find(list(range(9)))
    assert hit is not None and hit[0].cache is cache and store.bytes == 0
    store.drop(key)
    assert store.find(list(range(9))) is None
    store.keep(cache, last_clean_hidden, list(range(8)))
    assert len(store) == 0, "a limit of 0 keeps nothing"


def test_a_prefix_may_be_taken_over_only_into_an_empty_cache():
    model = random_model("llama", "block", BLOCK)
    cache, _ = filled(model, list(range(8)))
    with pytest.raises(AssertionError):
        cache.adopt(BlockCache.of(model, 8), 4)


def test_rows_with_other_decoders_are_decided_as_if_alone():
    """Of three rows with two decoders, each gets the edit that its own makes for it alone."""
    draw = torch.Generator().manual_seed(0)
    model = random_model("llama", "block", BLOCK)
    kinds = [
        make_decoder(decoder_section("S_MODE", tau_mask=0.05, tau_edit=None)),
        make_decoder(decoder_section("Q_MODE", tau_mask=0.9, tau_edit=0.0)),
    ]
    decoders = [kinds[0], kinds[1], kinds[0]]
    session = DecodeState(model, [[1, 2], [3], [4, 5, 6]], [12, 12, 12], lambda *_: False)
    session.rows[1].tokens[2] = 7
    canvas = session.canvas()
    together = PerRow(decoders)
    where = together.needs(canvas)
    assert where.sum(-1).tolist() == [2, 3, 1], "only the row that edits reads what is written"
    logits = torch.randn(int(where.sum()), 64, generator=draw, dtype=torch.float64) * 3
    edit = together.edit(logits, where, canvas)
    begin = 0
    for row, decoder in enumerate(decoders):
        one = _part(canvas, torch.tensor([row]), ())
        count = int(where[row].sum())
        alone = decoder.edit(logits[begin : begin + count], where[row : row + 1], one)
        begin += count
        for name in ("write", "tokens", "confidence", "final"):
            assert torch.equal(getattr(edit, name)[row], getattr(alone, name)[0]), name


def test_pieces_are_shown_once_and_joined_are_the_text():
    pieces: list[str] = []
    transcript = IncrementalDetokenizer(StubTokenizer(letters=True), [1], frozenset({25}), ("CD",), pieces.append)
    assert transcript.add([0, 1], full=False) is None and pieces == ["AB"]
    assert transcript.add([0, 1, 2], full=False) is None and pieces == ["AB"], "C may begin a stop string"
    assert transcript.add([0, 1, 2, 4, 5], full=False, held=1) is None and pieces == ["AB", "CE"]
    ending = transcript.add([0, 1, 2, 4, 5, 2, 3, 25], full=False)
    assert ending is not None and (ending.text, ending.reason, ending.tokens) == (
        "ABCEF",
        "stop",
        [0, 1, 2, 4, 5, 2, 3],
    )
    assert "".join(pieces) == ending.text
