"""Pruned caches: what is never dropped, that a mask and moved slots are the same, and who may use them."""

from contextlib import contextmanager

import pytest
import torch

from conftest import random_model
from decoding_stubs import StubTokenizer
from hildanext.bench.decode_speed import DecodeSpeedConfig, Pairs, loop_against_bare
from hildanext.bench.engine_speed import together
from hildanext.core.config import validate
from hildanext.core.errors import ConfigError, HildaError
from hildanext.core.registry import under_profile
from hildanext.decoding import make_decoder
from hildanext.decoding.base import run, step
from hildanext.decoding.state import DecodeState
from hildanext.engine.base import Request, complete, refuse_given
from hildanext.engine.local import LocalEngine, LocalEngineConfig
from hildanext.eval.evaluation import EvalConfig
from hildanext.eval.runner import QualityConfig
from hildanext.inference import GenerationConfig, generate
from hildanext.kv_cache import BlockCache
from hildanext.kv_cache.prune import PRUNES, make_prune
from hildanext.kv_cache.prune.base import Slots
from hildanext.kv_cache.prune.pruned_cache import PrunedCache, open_cache, slots_for
from hildanext.memory_plan import sections as plan_sections
from hildanext.memory_plan.architecture import find_architecture
from hildanext.memory_plan.serving import Serving, serving_peak

BLOCK = 4
LENGTH = 320
DROPPING = ["knorm", "keydiff", "streaming", "noncausal"]
ALL = [*DROPPING, "mask_guided"]
CASES = [(alignment, name) for alignment in ("block", "parent") for name in DROPPING]
FILL = {"name": "threshold_edit", "tau_mask": 0.2, "tau_edit": None}


def policy(name, **knobs):
    with under_profile("FULL"):
        return make_prune({"name": name, **knobs})


def settings_of(cache, **more):
    with under_profile("FULL"):
        return GenerationConfig(cache=cache, **more)


def tokens_of(model, count, seed=0):
    return torch.randint(0, model.card.vocab_real, (1, count), generator=torch.Generator().manual_seed(seed))


def cache_of(model, name, prompt=0, window=0, capacity=LENGTH, **knobs):
    return open_cache(model, capacity, prompt, policy(name, **knobs), window)


def feed(model, cache, tokens, clean, noisy=0):
    """One forward of the next tokens, the clean ones of which are committed."""
    context = cache.context(clean, noisy)
    start = cache.length
    with torch.no_grad():
        hidden = model(model.embed(tokens[:, start : start + clean + noisy]), context.positions, context)
    cache.commit(start + clean, tokens[0])
    return hidden[0]


def live_of(cache, layer):
    """Which positions each head still has."""
    if cache.hidden is None:
        return torch.ones(cache.keys.shape[1], cache.length - cache.dropped, dtype=torch.bool)
    return ~cache.hidden[layer, :, : cache.length]


@pytest.mark.parametrize("name", ALL)
def test_ratio_0_is_the_plain_cache(name):
    """CV-29. Not an equal one: the same class, so that it costs nothing."""
    model = random_model("llama", "block", BLOCK)
    assert type(cache_of(model, name, ratio=0.0)) is BlockCache
    prompts, decoder = [tokens_of(model, 150)[0].tolist()], make_decoder(dict(FILL))
    plain = generate(model, None, prompts, decoder, GenerationConfig(max_new_tokens=12))
    off = generate(model, None, prompts, decoder, settings_of({"name": name, "ratio": 0.0}, max_new_tokens=12))
    assert [one.tokens for one in off] == [one.tokens for one in plain]


@pytest.mark.parametrize("name", ALL)
def test_a_document_with_nothing_to_drop_has_the_plain_caches_bits(name):
    model = random_model("qwen3", "block", BLOCK)
    tokens, whole = tokens_of(model, 128), BlockCache.of(model, 128)
    cache = cache_of(model, name, capacity=128, ratio=0.9)
    for clean, noisy in ((64, 4), (4, 4), (56, 4)):
        assert torch.equal(feed(model, cache, tokens, clean, noisy), feed(model, whole, tokens, clean, noisy))
    assert torch.equal(cache.keys, whole.keys) and torch.equal(cache.values, whole.values) and cache.dropped == 0


@pytest.mark.parametrize(("alignment", "name"), CASES)
def test_mask_and_moved_slots_are_the_same_and_protected_ones_stay(alignment, name):
    """CV-30."""
    for seed in range(2):
        model = random_model(["llama", "qwen2", "qwen3"][seed], alignment, BLOCK, seed=seed)
        tokens, ratio = tokens_of(model, LENGTH, seed), [0.3, 0.5, 0.25][seed]
        compact, masked = (cache_of(model, name, prompt=284, ratio=ratio, compact=way) for way in (True, False))
        assert isinstance(masked, PrunedCache)
        for clean in [284, *[BLOCK] * 4]:
            one, other = (feed(model, cache, tokens, clean, BLOCK) for cache in (compact, masked))
            torch.testing.assert_close(model.logits(one), model.logits(other), atol=1e-9, rtol=0)
            length = masked.length
            kept = int(length * (1 - ratio))
            assert 132 < kept and compact.length - compact.dropped == kept
            for layer in range(3):
                live = live_of(masked, layer)
                assert live.sum(-1).tolist() == [kept, kept]
                assert bool(live[:, :4].all()) and bool(live[:, -128:].all())
                for kind in ("keys", "values"):
                    where = getattr(masked, kind)[layer, :, :length][live].view(2, kept, -1)
                    torch.testing.assert_close(getattr(compact, kind)[layer, :, :kept], where, atol=1e-9, rtol=0)
        assert bool((masked.hidden[0, 0] != masked.hidden[0, 1]).any()) or name == "streaming"


def test_what_each_policy_keeps():
    keys = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [2.0, 0.0], [5.0, 0.0]]], dtype=torch.float64)
    live = torch.tensor([[True, True, False, True]])
    assert policy("knorm").scores(Slots(keys, None, None)).tolist() == [[-3, -1, -2, -5]]
    assert policy("streaming").scores(Slots(keys, None, None)).tolist() == [[0, 1, 2, 3]]
    mean = torch.tensor([2.0, 1.0]).double() / 3  # of what is live
    like = [mean[0], mean[1], mean[0], mean[0]]
    expected = -torch.stack(like) / mean.norm()
    torch.testing.assert_close(policy("keydiff").scores(Slots(keys, live, None))[0], expected)
    attention = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    assert policy("noncausal").scores(Slots(keys, None, attention)) is attention
    assert policy("knorm", ratio=0.5).kept(1001, 128) == 500
    assert policy("knorm", ratio=0.5).kept(200, 128) == 132 and policy("knorm", ratio=0.5).kept(100, 128) == 100


def test_noncausal_scores_are_the_attention_inside_a_block():
    model = random_model("llama", "block", BLOCK, layers=1)
    cache, tokens = cache_of(model, "noncausal"), tokens_of(model, 8)
    seen = {}
    attend = type(cache.row(cache.context(8, 0).segments[0], slice(0, 8), 2)).attend

    def spy(self, layer, query, key, value, output, scale):
        seen["all"] = (query.clone(), key.clone(), scale)
        attend(self, layer, query, key, value, output, scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hildanext.kv_cache.prune.pruned_row.PrunedRow.attend", spy)
        feed(model, cache, tokens, 8)
    query, key, scale = seen["all"]
    for head in range(2):
        for block in range(2):
            span = slice(block * 4, block * 4 + 4)
            rows = torch.cat([query[span, 2 * head], query[span, 2 * head + 1]])
            expected = (rows @ key[span, head].T * scale).softmax(-1).mean(0)
            torch.testing.assert_close(cache.attention[0, head, span], expected)


def state_of(model, prompts, new, prune, window=0, **more):
    texts = {}

    def ended(row, text):
        texts[row.index] = text
        return False

    limits = [len(prompt) + new for prompt in prompts]
    return DecodeState(model, prompts, limits, ended, prune=prune, window=window, debug=True, **more), texts


@pytest.mark.parametrize(("name", "commit"), [*((name, "auto") for name in DROPPING), ("knorm", "separate")])
def test_scoring_events_do_not_depend_on_denoising_forwards(name, commit):
    """CV-31."""
    model, counts = random_model("llama", "block", BLOCK), []
    prompt = tokens_of(model, 150)[0].tolist()
    for tau in (0.0, 1.0):
        state, _ = state_of(model, [prompt], 14, policy(name), commit=commit)
        (row,) = [*state.joining, *state.rows]
        row.cache.piece = 64
        state.prefill()
        assert row.cache.events == 3 == row.prefill, "two whole pieces, and the end of the prompt"
        run(make_decoder({**FILL, "tau_mask": tau}), state)
        blocks = (row.cached - 148) // BLOCK
        assert row.cache.events == 3 + blocks and blocks >= 3
        counts.append(row.denoise)
    assert counts[0] < counts[1]


@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_keys_and_values_in_another_order_are_the_same(alignment):
    """CV-32."""
    model = random_model("qwen3", alignment, BLOCK)
    tokens = tokens_of(model, 40)
    one, other = BlockCache.of(model, 40), BlockCache.of(model, 40)
    for cache in (one, other):
        feed(model, cache, tokens, 36)
    for layer in range(3):
        for head in range(2):
            order = torch.randperm(36, generator=torch.Generator().manual_seed(layer * 2 + head))
            for whole in (other.keys, other.values):
                whole[layer, head, :36] = whole[layer, head, order]
    assert not torch.equal(one.keys, other.keys)
    read = [model.logits(feed(model, cache, tokens, 0, BLOCK)) for cache in (one, other)]
    torch.testing.assert_close(*read, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", DROPPING)
def test_truncation_restores_what_was_dropped_behind_it_and_nothing_before(name):
    """What later commits dropped before it stays dropped, so that blocks that run again see less than they did."""
    model = random_model("llama", "block", BLOCK)
    tokens, caches = tokens_of(model, LENGTH), {}
    for compact in (True, False):
        cache = caches[compact] = cache_of(model, name, prompt=280, compact=compact)
        for clean in (280, 8, 8):
            feed(model, cache, tokens, clean)
        hidden = None if compact else cache.hidden.clone()
        made = []
        for _ in range(2):
            cache.truncate(288)
            assert cache.length == 288
            feed(model, cache, tokens, 8)
            used = cache.length - cache.dropped
            made.append(torch.cat([cache.keys[:, :, :used], cache.values[:, :, :used]]))
            assert compact or torch.equal(cache.hidden, hidden)
        assert torch.equal(*made)
    compact, masked = caches[True], caches[False]
    assert compact.dropped == 148 == int(masked.hidden[0, 0].sum())
    live = live_of(masked, 2)
    torch.testing.assert_close(compact.keys[2, :, :148], masked.keys[2, :, :296][live].view(2, 148, -1))
    with pytest.raises(AssertionError, match="the window is larger"):
        compact.truncate(12)
    masked.truncate(48)
    assert not masked.hidden[:, :, 48:].any() and torch.equal(masked.hidden[:, :, :48], hidden[:, :, :48])
    assert bool(hidden[:, :, :48].any())
    feed(model, masked, tokens, 40, BLOCK)
    assert not masked.hidden[:, :, 48:].any(), "few slots: nothing more is dropped"


@pytest.mark.parametrize("compact", [True, False])
def test_snapshots_and_adopted_blocks_are_those_of_a_plain_cache(compact):
    model, tokens = random_model("llama", "block", BLOCK), tokens_of(random_model(), LENGTH)
    whole, cache = BlockCache.of(model, LENGTH), cache_of(model, "knorm", prompt=180, compact=compact)
    feed(model, whole, tokens, 180)
    cache.piece = 64
    cache.adopt(whole, 180)
    assert cache.length == 180 and cache.events == 3
    kept = cache.snapshot(172, 180)
    torch.testing.assert_close(kept[0], whole.keys[:, :, 172:180])
    begin = 172 - cache.dropped
    cache.keys[:, :, begin : begin + 8] = 0
    cache.restore(172, kept)
    torch.testing.assert_close(cache.keys[:, :, begin : begin + 8], whole.keys[:, :, 172:180])
    with pytest.raises(AssertionError, match="only whole caches lend"):
        BlockCache.of(model, LENGTH).adopt(cache, 180)


EDITS = {"name": "threshold_edit", "tau_mask": 0.2, "tau_edit": 0.0, "max_post": 3, "window": 40}


WHOLE = [*((name, "block", EDITS) for name in ALL), ("keydiff", "parent", FILL), ("mask_guided", "parent", EDITS)]


@pytest.mark.parametrize(("name", "alignment", "decoder"), WHOLE)
def test_whole_texts_by_mask_and_by_moved_slots_are_the_same(name, alignment, decoder):
    """Rows of several lengths together, finished blocks edited: 40 blocks of window protect more than 128 slots."""
    model = random_model("llama", alignment, BLOCK)
    prompts = [tokens_of(model, count, count)[0].tolist() for count in (182, 230, 3)]
    told, edits, dropped = [], [], []
    for compact in (True, False):
        state, texts = state_of(model, prompts, 13, policy(name, ratio=0.3, compact=compact), decoder.get("window", 0))
        rows = [*state.joining, *state.rows]
        state.prefill()
        run(make_decoder(dict(decoder)), state)
        told.append(texts)
        edits.append(sum(row.edits for row in rows))
        dropped.append([row.cache.dropped for row in rows[:2]])
    assert told[0] == told[1] and edits[0] == edits[1]
    assert (name == "mask_guided") or all(count > 0 for count in dropped[0]) and dropped[1] == [0, 0]
    assert decoder is FILL or edits[0] > 0
    alone = []
    for number, prompt in enumerate(prompts[:2]):
        state, texts = state_of(model, [prompt], 13, policy(name, ratio=0.3), decoder.get("window", 0), seeds=[number])
        state.prefill()
        run(make_decoder(dict(decoder)), state)
        alone.append(texts[0])
    assert alone == [told[0][number] for number in range(2)]


@pytest.mark.parametrize("name", DROPPING)
def test_what_is_dropped_does_not_depend_on_the_size_of_forwards(name):
    model = random_model("qwen2", "block", BLOCK)
    prompt = tokens_of(model, 300)[0].tolist()
    caches = []
    for budget in (8, 100, 1000):
        state, _ = state_of(model, [prompt], 8, policy(name))
        (row,) = state.joining
        row.cache.piece = 120
        while state.joining:
            state.prefill_step(budget)
        caches.append(row.cache)
    for other in caches[1:]:
        assert other.dropped == caches[0].dropped == 150 and other.events == caches[0].events == 3
        torch.testing.assert_close(other.keys[:, :, :150], caches[0].keys[:, :, :150], atol=1e-9, rtol=0)


@pytest.mark.parametrize("compact", [True, False])
def test_guided_by_its_first_forward_a_block_sees_what_that_chose(compact):
    model = random_model("llama", "block", BLOCK)
    tokens = tokens_of(model, LENGTH)
    whole = BlockCache.of(model, LENGTH)
    cache = cache_of(model, "mask_guided", ratio=0.75, newest=8, compact=compact)
    for one in (whole, cache):
        feed(model, one, tokens, 96)
    first = [feed(model, one, tokens, 0, BLOCK) for one in (whole, cache)]
    assert torch.equal(*first), "the first forward sees everything"
    assert cache.events == 1
    later = feed(model, cache, tokens, 0, BLOCK)
    assert not torch.allclose(later, first[0])
    assert torch.equal(feed(model, cache, tokens, 0, BLOCK), later) and cache.events == 1
    kept = int(96 * 0.25)
    if compact:
        assert [choice[0].shape[1] for choice in cache.guide.layers] == [kept + BLOCK] * 3
    else:
        seen = [~hidden for hidden in cache.guide.layers]
        assert all(one.sum(-1).tolist() == [kept, kept] for one in seen)
        assert all(bool(one[:, :4].all()) and bool(one[:, -8:].all()) for one in seen)
    torch.testing.assert_close(cache.keys[:, :, :96], whole.keys[:, :, :96], atol=0, rtol=0)
    for one in (whole, cache):  # the next block: its clean rows see everything again
        feed(model, one, tokens, BLOCK, BLOCK)
    torch.testing.assert_close(cache.keys[:, :, :100], whole.keys[:, :, :100], atol=1e-12, rtol=0)
    assert cache.events == 2


def test_guided_choice_is_the_attention_that_masks_give():
    model = random_model("llama", "block", BLOCK, layers=1)
    tokens = tokens_of(model, 64)
    cache = cache_of(model, "mask_guided", ratio=0.75, newest=8, compact=False)
    feed(model, cache, tokens, 60)
    seen = {}

    def spy(query, key, scale):
        rows = query[0] @ key[0].transpose(-1, -2) * scale
        seen["all"] = rows.softmax(-1).mean(-2)
        return seen["all"][None]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hildanext.kv_cache.prune.pruned_row.received", spy)
        feed(model, cache, tokens, 0, BLOCK)
    for head in range(2):
        best = seen["all"][head, 4:52].topk(3).indices + 4
        expected = {0, 1, 2, 3, *range(52, 60), *best.tolist()}
        assert set((~cache.guide.layers[0][head]).nonzero()[:, 0].tolist()) == expected


def test_slots_that_are_counted_are_those_that_are_allocated():
    model = random_model("llama", "block", BLOCK)
    half = policy("knorm")
    assert slots_for(None, 400, 512, BLOCK) == slots_for(policy("knorm", ratio=0.0), 400, 512, BLOCK) == 512
    assert slots_for(policy("knorm", compact=False), 400, 512, BLOCK) == 512
    assert slots_for(half, 2048, 2304, 32) == 1024 + 256, "a piece of the prompt beside what is kept"
    assert slots_for(half, 32768, 32768 + 256, 32) == 32768 // 2 + 256
    assert slots_for(half, 4, 2048, BLOCK) == 1024 + 2 * BLOCK
    assert slots_for(policy("mask_guided", ratio=0.75), 4, 2048, BLOCK) == 2048 + 512 + BLOCK
    assert cache_of(model, "knorm", capacity=512).capacity == 320, "whole stretches of 64"
    prompt = tokens_of(model, 5)[0].tolist()
    state, _ = state_of(model, [prompt], 300, half)
    run(make_decoder({**FILL, "tau_mask": 0.0}), state)


@contextmanager
def engine_of(model, **settings):
    engine = LocalEngine(model, StubTokenizer(bos=0), None, LocalEngineConfig(**settings))
    try:
        yield engine
    finally:
        engine.close()


def test_an_engine_serves_pruned_rows_beside_others_and_lends_nothing():
    model = random_model("llama", "block", BLOCK)
    prompt = tokens_of(model, 300)[0].tolist()
    caches = [None, {"name": "knorm", "ratio": 0.9}, {"name": "mask_guided", "ratio": 0.9, "newest": 8}, "noncausal"]
    expected = [
        generate(model, StubTokenizer(bos=0), [prompt], make_decoder(dict(FILL)), settings)[0].tokens
        for settings in (settings_of(cache, max_new_tokens=10, seed=3) for cache in caches)
    ]
    assert any(one != expected[0] for one in expected[1:])
    with engine_of(model, slots=4, prefill_tokens=32) as engine, under_profile("FULL") as research:
        asked = [
            Request(tokens=tuple(prompt), decoder=FILL, max_new_tokens=10, seed=3, cache=cache, ignore_eos=False)
            for cache in caches
        ]
        answers, _ = together(engine, asked[1:])
        assert [answer.tokens for answer in answers] == expected[1:]
        assert [answer.cached_tokens for answer in answers] == [0, 0, 0] and len(engine.prefixes) == 0
        plain = complete(engine, asked[0])
        assert plain.tokens == expected[0] and plain.cached_tokens == 0 and len(engine.prefixes) == 1
        assert [answer.tokens for answer in together(engine, asked)[0]] == expected
        assert {"knorm", "mask_guided", "noncausal"} <= research


def test_admission_counts_what_is_kept():
    model = random_model("llama", "block", BLOCK)
    of_a_token = 2 * 3 * 2 * 8 * 8
    with engine_of(model) as engine, under_profile("FULL"):
        request = Request(tokens=(1, 2, 3), max_new_tokens=400, cache="knorm")
        state = engine._checked(request, lambda event: None)
        assert state.bytes == (404 // 2 + 2 * BLOCK) * of_a_token
        state = engine._checked(Request(tokens=(1, 2, 3), max_new_tokens=400), lambda event: None)
        assert state.bytes == 404 * of_a_token


BAD = {
    "unknown policy": ({"name": "snapkv"}, "unknown cache 'snapkv'"),
    "no name": ({"ratio": 0.5}, "cache has no name"),
    "unknown knob": ({"name": "knorm", "share": 0.5}, "share"),
    "everything": ({"name": "knorm", "ratio": 1.0}, "ratio"),
    "negative": ({"name": "knorm", "ratio": -0.1}, "ratio"),
    "no number": ({"name": "knorm", "ratio": float("nan")}, "ratio"),
    "a text": ({"name": "knorm", "ratio": "half"}, "ratio"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sections_are_one_line(case):
    section, said = BAD[case]
    with under_profile("FULL"), pytest.raises(HildaError) as problem:
        make_prune(section)
    assert said in str(problem.value) and "\n" not in str(problem.value)


@pytest.mark.parametrize("name", PRUNES)
def test_under_safe_each_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"'{name}' is a FULL method"):
        GenerationConfig(cache=name)
    with engine_of(random_model()) as engine, pytest.raises(ConfigError, match=f"'{name}' is a FULL method"):
        engine._checked(Request(tokens=(1, 2), cache={"name": name}), lambda event: None)


def test_who_reads_whole_caches_refuses():
    model = random_model("llama", "block", BLOCK)
    with under_profile("FULL"):
        s2d2 = make_decoder({"name": "s2d2"})
    with pytest.raises(ConfigError, match="S2D2 verifies against whole caches"):
        generate(model, None, [[1, 2]], s2d2, settings_of("knorm"))
    with pytest.raises(ConfigError, match="cached is false"):
        settings_of("knorm", cached=False)
    with pytest.raises(ConfigError, match="which dinfer decides for itself"):
        refuse_given(Request(tokens=(1,), cache="knorm"), "dinfer")
    model.slots_first = 64
    with pytest.raises(ConfigError, match="ONNX"):
        generate(model, None, [[1, 2]], make_decoder(dict(FILL)), settings_of("knorm"))


def test_a_step_of_a_row_that_rested_goes_on_where_it_was():
    model = random_model("llama", "block", BLOCK)
    prompts = [tokens_of(model, 180)[0].tolist()]
    state, texts = state_of(model, prompts, 16, policy("mask_guided", newest=8))
    state.prefill()
    decoder = make_decoder({**FILL, "tau_mask": 1.0})
    (row,) = state.rows
    for _ in range(5):
        step(decoder, state, state.canvas())
    state.remove(row)
    assert state.canvas() is None
    state.add(row)
    run(decoder, state)
    whole, expected = state_of(model, prompts, 16, policy("mask_guided", newest=8))
    whole.prefill()
    run(decoder, whole)
    assert texts == expected


def test_a_plan_counts_kept_slots():
    case = Serving(find_architecture("tiny"), 1, 1024, 8, 4, prune=policy("knorm"))
    whole = Serving(find_architecture("tiny"), 1, 1024, 8, 4)
    assert (whole.slots, case.slots) == (1024, 512 + 256)
    of_a_token = 2 * whole.shape.layers * whole.shape.key * 4
    peaks = [serving_peak(one, 0).parts["cache"] for one in (whole, case)]
    assert peaks[0] - peaks[1] == 256 * of_a_token
    steps = [("generate", {"generation": {"cache": "knorm"}})]
    assert plan_sections.cache_of({}, steps) == "knorm"
    assert plan_sections.cache_of({"generation": {"cache": "keydiff"}}, []) == "keydiff"
    assert plan_sections.cache_of({"generation": {"seed": 1}}, [("convert", {})]) is None


SECTIONS = {
    "eval": (EvalConfig, {"model": "", "data": "", "generation": {"cache": "knorm"}}),
    "tasks": (QualityConfig, {"tasks": {"gsm8k": {"data": "x"}}, "cache": "knorm"}),
    "bench": (DecodeSpeedConfig, {"cache": "knorm"}),
}


@pytest.mark.parametrize("door", SECTIONS)
def test_every_section_takes_it_under_full_and_refuses_it_under_safe(door):
    kind, section = SECTIONS[door]
    with pytest.raises(ConfigError, match="'knorm' is a FULL method"):
        validate(kind, section, door)
    with under_profile("FULL") as research:
        validate(kind, section, door)
    assert "knorm" in research


def test_the_loop_is_measured_with_a_pruned_cache():
    model = random_model("llama", "block", BLOCK)
    with under_profile("FULL"):
        settings = DecodeSpeedConfig(prompt_tokens=150, new_tokens=4, cache={"name": "mask_guided", "newest": 8})
        into = {name: Pairs() for name in ("step", "step + commit")}
        loop_against_bare(model, FILL, settings, tokens_of(model, 150)[0].tolist(), into)
    assert sum(len(pairs.loop) for pairs in into.values()) > 0
