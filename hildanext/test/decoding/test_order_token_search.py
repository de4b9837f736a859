"""Order-Token Search (CV-26 to 28): alone it is plain decoding; beams, their scores, their caches, what they cost."""

import random

import pytest
import torch

from conftest import random_model
from decoding_stubs import MASK, ScriptedModel, StubTokenizer
from hildanext import inference
from hildanext.core.errors import ConfigError
from hildanext.core.registry import under_profile
from hildanext.decoding import OrderTokenSearch, ThresholdEdit, make_decoder
from hildanext.decoding import order_token_search as searching
from hildanext.decoding.beams import Beam, LogP, best, merged, ranking_noise, shares
from hildanext.decoding.state import DecodeState
from hildanext.engine.base import Request
from hildanext.engine.local import LocalEngine, LocalEngineConfig
from hildanext.facade import load_model, stream_text
from hildanext.inference import GenerationConfig, generate

BLOCK, NEW = 4, 12
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
PLAIN = {"tau_mask": 1.0, "tau_edit": None, "max_post": 0}


def searched(model, prompts=PROMPTS, tokenizer=None, settings=None, **knobs):
    """The results, and of each prompt the beams that were left, best first."""
    left = {}

    class Told(searching.Search):
        def _end(self, request, beams):
            left[beams[0].row.prompt, beams[0].row.index] = [(beam.text(), beam.whole, beam.plain) for beam in beams]
            super()._end(request, beams)

    settings = {"max_new_tokens": NEW, "debug": True} | (settings or {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(searching, "Search", Told)
        done = generate(model, tokenizer, prompts, OrderTokenSearch(**knobs), GenerationConfig(**settings))
    return done, [left[key] for key in sorted(left, key=lambda key: key[1])]


def same(one, other):
    assert [result.tokens for result in one] == [result.tokens for result in other]
    for a, b in zip(one, other, strict=True):
        kinds = ("prefill_forwards", "denoise_forwards", "commit_forwards", "edits", "rows")
        assert [getattr(a.stats, kind) for kind in kinds] == [getattr(b.stats, kind) for kind in kinds]
        assert a.trace == b.trace


@pytest.mark.parametrize("score", ["eq2", "path_ll"])
@pytest.mark.parametrize("knobs", [PLAIN, {"tau_mask": 0.3, "tau_edit": 0.2, "max_post": 2}])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_a_single_beam_is_the_plain_decoder_CV_26(alignment, temperature, knobs, score):
    """Token for token, forward for forward and step for step; uneven rows in one batch, and both ways to commit."""
    model = random_model(alignment=alignment, block_size=BLOCK, layers=2)
    knobs = {**knobs, "temperature": temperature}
    for commit in ("auto", "separate"):
        settings = GenerationConfig(max_new_tokens=NEW, trace=True, commit=commit)
        plain = generate(model, None, PROMPTS, ThresholdEdit(**knobs), settings)
        alone, left = searched(model, settings={"trace": True, "commit": commit}, beams=1, score=score, **knobs)
        same(plain, alone)
        assert [len(beams) for beams in left] == [1, 1, 1]


@pytest.mark.parametrize("children", ["all", "each"])
def test_equal_children_become_one_and_the_text_is_the_plain_one_CV_27(children):
    model = random_model(block_size=BLOCK, layers=2)
    plain = generate(model, None, PROMPTS, ThresholdEdit(**PLAIN), GenerationConfig(max_new_tokens=NEW))
    done, left = searched(model, beams=3, children=children, temperature=0.0, **PLAIN)
    assert [result.tokens for result in done] == [result.tokens for result in plain]
    assert all(len(beams) == 1 and beams[0][2] for beams in left)


def beam_of(tokens, whole=(0.0, 1), last=(0.0, 1), plain=False, prompt=0, eos=frozenset()):
    state = DecodeState(random_model(block_size=2, vocab=61, layers=1), [], [], lambda *_: False, cached=False)
    row = state.row([7] * prompt, prompt + len(tokens), 0, 0)
    row.tokens[prompt : prompt + len(tokens)] = torch.tensor(tokens)
    row.start, row.eos = prompt + len(tokens), eos
    return Beam(row, plain, LogP(*whole), LogP(*last))


def test_the_scores_are_sums_of_hand_made_log_probabilities_CV_28():
    """eq2 reads the first forward alone, wherever edits went; masks, given tokens and what stands behind an end do not
    count."""
    table = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.6, 0.3]], dtype=torch.float64).log()
    for tokens, eos, total, count in (
        ([0, 1], frozenset(), 0.5 * 0.6, 2),
        ([2, 0], frozenset(), 0.25 * 0.1, 2),
        ([0, 9], frozenset(), 0.5, 1),
        ([1, 2], frozenset({1}), 0.25, 1),
    ):
        for score in ("eq2", "path_ll"):
            beam = beam_of(tokens, whole=(-1.0, 4), eos=eos)
            beam.first, beam.read = torch.cat([table, torch.zeros(2, 9)], 1), torch.tensor([True, True])
            path = [float(beam.first[place, token]) for place, token in enumerate(tokens)]
            beam.path = torch.tensor(path, dtype=torch.float64) * (1.0 if score == "eq2" else 2.0)
            beam.finish_block(2, 9, score)
            expected = float(torch.tensor(total, dtype=torch.float64).log()) * (1.0 if score == "eq2" else 2.0)
            assert beam.last == (pytest.approx(expected), count)
            assert beam.whole == (pytest.approx(expected - 1.0), count + 4) and beam.first is None
    beam = beam_of([0, 1], prompt=0)
    beam.first, beam.read = torch.cat([table[1:], torch.zeros(1, 9)], 1), torch.tensor([False, True])
    beam.path = torch.zeros(2, dtype=torch.float64)
    beam.finish_block(2, 9, "eq2")
    assert beam.last == (pytest.approx(float(torch.tensor(0.6, dtype=torch.float64).log())), 1)


def test_the_order_of_beams_decides_nothing_and_the_rules_what_is_best_CV_28():
    beams = [
        beam_of([1, 2], (-4.0, 4), (-1.0, 2)), beam_of([1, 3], (-4.0, 4), (-3.0, 2)),
        beam_of([2, 2], (-3.0, 2), (-2.0, 2)), beam_of([0, 1], (-9.0, 4), (-0.5, 2)),
    ]  # fmt: skip
    for accumulate, length, order in (
        (True, "mean", [[1, 2], [1, 3], [2, 2]]),
        (True, "sum", [[2, 2], [1, 2], [1, 3]]),
        (False, "mean", [[0, 1], [1, 2], [2, 2]]),
    ):
        for seed in range(6):
            mixed = random.Random(seed).sample(beams, len(beams))
            assert [list(beam.text()) for beam in best(mixed, 3, accumulate, length)] == order


def test_equal_texts_keep_the_best_score_and_the_plain_draws():
    plain, other = beam_of([1, 2], (-4.0, 2), plain=True), beam_of([1, 2], (-3.0, 2))
    for pair in ([plain, other], [other, plain]):
        plain.whole = LogP(-4.0, 2)
        (one,) = merged(pair, True, "mean")
        assert one is plain and one.whole == (-3.0, 2)
    assert len(merged([plain, beam_of([2, 1])], True, "mean")) == 2


def test_children_are_shared_out_to_the_best_that_want_them():
    beams = [beam_of([1, 2])] * 3
    assert shares(beams, [True] * 3, 5, each=False) == [2, 2, 1]
    assert shares(beams, [False, True, True], 5, each=False) == [1, 2, 2]
    assert shares(beams, [False] * 3, 5, each=False) == [1, 1, 1]
    assert shares(beams, [True, False, True], 4, each=True) == [4, 1, 4]
    assert shares(beams[:2], [True] * 2, 1, each=False) == [1, 1]


@pytest.mark.parametrize("score", ["eq2", "path_ll"])
@pytest.mark.parametrize("children", ["all", "each"])
def test_the_best_is_no_worse_than_the_single_beam_where_it_was_kept_CV_28(children, score):
    kept = 0
    for seed in range(4):
        model = random_model(block_size=BLOCK, layers=2, seed=seed)
        knobs = {**PLAIN, "score": score, "temperature": 0.8, "length": "sum"}
        _, alone = searched(model, PROMPTS[:1], beams=1, **knobs)
        done, left = searched(model, PROMPTS[:1], beams=3, keep=3, children=children, **knobs)
        ((text, whole, _),) = alone[0]
        totals = [beam[1].total for beam in left[0]]
        assert totals == sorted(totals, reverse=True) and tuple(done[0].tokens) == left[0][0][0][:NEW]
        for other, score_of, plain in left[0]:
            if plain:
                kept += 1
                assert other == text and score_of.total >= whole.total - 1e-9
                assert totals[0] >= whole.total - 1e-9
    assert kept > 0 or children == "each", "three of three are always kept"


@pytest.mark.parametrize("score", ["eq2", "path_ll"])
def test_scoring_costs_no_forward_and_four_beams_four_times_the_rows(score):
    """Children share their block's first forward: less than four times, and never more forwards."""
    model, calls = random_model(block_size=BLOCK, layers=2), []
    hook = model.causal_lm.register_forward_pre_hook(lambda *_: calls.append(1))
    base = getattr(model.causal_lm, model.causal_lm.base_model_prefix)
    inner = base.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    alone = searched(model, PROMPTS[:1], beams=1, score=score, **PLAIN)[0][0]
    once, calls[:] = len(calls), []
    four = searched(model, PROMPTS[:1], beams=4, score=score, **PLAIN)[0][0]
    hook.remove()
    inner.remove()
    assert len(calls) == once > 0 and four.stats.forwards == alone.stats.forwards
    assert 2 * alone.stats.rows < four.stats.rows <= 4 * alone.stats.rows


@pytest.mark.parametrize("alignment", ["block", "parent"])
@pytest.mark.parametrize("children", ["all", "each"])
def test_beams_have_caches_of_their_own(alignment, children):
    """Cached, committed either way and in a batch or alone, a search is the same as without any cache; edits on, and
    the cache checked before each forward."""
    model = random_model(alignment=alignment, block_size=BLOCK, layers=2)
    knobs = {"tau_mask": 0.3, "tau_edit": 0.1, "max_post": 2, "beams": 3, "keep": 2, "temperature": 0.7}
    knobs["children"] = children
    slow, left = searched(model, settings={"cached": False}, **knobs)
    for settings in ({}, {"commit": "separate"}, {"commit": "fused"}, {"batch_size": 1}):
        fast, others = searched(model, settings=settings, **knobs)
        assert [result.tokens for result in fast] == [result.tokens for result in slow]
        assert [[beam[0] for beam in beams] for beams in others] == [[beam[0] for beam in beams] for beams in left]
        assert [result.stats.edits for result in fast] == [result.stats.edits for result in slow]
    assert sum(len(beams) for beams in left) > 3, "the beams differ"


@pytest.mark.parametrize("length", ["mean", "sum"])
def test_beams_that_end_early_wait_and_are_compared_by_the_rule(length, monkeypatch):
    """A text that ends in its first block against one that goes on, surely: per token the long one is better, by the
    sum the short one."""

    def script(tokens, position):
        first = tokens[0]
        if position == 4 and first == MASK:
            return [(10, 0.4), (2, 0.4), (2, 0.4), (2, 0.4)]
        return [(2, 0.95)] * len(tokens)

    monkeypatch.setattr(inference, "bytes_per_token", lambda causal_lm: 1)
    knobs = {"temperature": 1.0, "beams": 4, "keep": 4, "length": length, "fallback": "left", **PLAIN}
    model = ScriptedModel(script, block_size=BLOCK)
    done, left = searched(model, [[7] * 4], StubTokenizer(eos=10), {"max_new_tokens": 40}, **knobs)
    texts = [beam[0] for beam in left[0]]
    values = [beam[1].value(length) for beam in left[0]]
    assert values == sorted(values, reverse=True) and len({len(text) for text in texts}) > 1, "uneven ends"
    assert any(10 in text for text in texts) and (10 in texts[0]) == (length == "sum")
    assert list(texts[0])[: len(done[0].tokens)] == done[0].tokens


def test_a_search_only_where_the_model_is_not_sure():
    model = random_model(block_size=BLOCK, layers=2)
    plain = generate(
        model, None, PROMPTS, ThresholdEdit(temperature=0.8, **PLAIN), GenerationConfig(max_new_tokens=NEW)
    )
    never, left = searched(model, beams=4, search_below=1e-9, temperature=0.8, **PLAIN)
    same(plain, never)
    always, _ = searched(model, beams=4, search_below=1.0, temperature=0.8, **PLAIN)
    assert [len(beams) for beams in left] == [1, 1, 1]
    assert sum(one.stats.rows for one in always) > 2 * sum(one.stats.rows for one in never)


def test_noise_ranks_the_fallback_alone_and_never_the_plain_beam():
    """Greedy beams that differ by order; where all masks pass a threshold, noise changes nothing."""
    model = random_model(block_size=8, layers=2, seed=3)
    knobs = {"tau_edit": None, "max_post": 0, "temperature": 0.0, "beams": 4, "order_noise": 3.0}
    _, left = searched(model, PROMPTS[:1], settings={"max_new_tokens": 16}, tau_mask=1.0, **knobs)
    assert len({beam[0] for beam in left[0]}) > 1
    _, left = searched(model, PROMPTS[:1], settings={"max_new_tokens": 16}, tau_mask=0.0, **knobs)
    assert len(left[0]) == 1
    plain, other = beam_of([1, 2], plain=True), beam_of([1, 2])
    assert (ranking_noise(plain, 2, 3.0) == 1).all() and (ranking_noise(other, 2, 0.0) == 1).all()
    assert (ranking_noise(other, 2, 3.0) == ranking_noise(other, 2, 3.0)).all()
    assert (ranking_noise(other, 2, 3.0) != 1).all()


def test_a_search_without_room_is_refused(monkeypatch):
    monkeypatch.setattr(inference, "available_memory", lambda device: 10_000)
    with pytest.raises(ConfigError, match=r"16 beams of 3 prompts at a time take \d+ MiB .* free: give fewer beams"):
        searched(random_model(block_size=BLOCK, layers=2), beams=4, children="each")


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"window": 1, "tau_edit": 0.5}, "window 1 edits finished blocks"),
        ({"beams": 2, "keep": 3}, "keep 3 is above beams 2"),
        ({"order_noise": 1.0, "fallback": "left"}, "which ranks nothing"),
        ({"beams": 0}, "beams"),
        ({"score": "eq3"}, "score"),
        ({"search_below": float("nan")}, "search_below"),
        ({"beam": 2}, "did you mean 'beams'"),
    ],
)
def test_bad_knobs(knobs, says):
    with under_profile("FULL"), pytest.raises(ConfigError, match=says):
        make_decoder({"name": "order_token_search", **knobs})


def test_it_is_a_full_method_and_no_stream():
    with pytest.raises(ConfigError, match="FULL method"):
        make_decoder({"name": "order_token_search"})


def test_neither_the_engine_nor_a_stream_takes_it():
    """They show a text while it is written; where it is refused the reason is told."""
    model = random_model("llama", "block", BLOCK)
    engine = LocalEngine(model, StubTokenizer(bos=0), None, LocalEngineConfig())
    try:
        with under_profile("FULL"), pytest.raises(ConfigError, match="order_token_search writes several texts"):
            engine.submit(Request(tokens=(1, 2), decoder={"name": "order_token_search"}, max_new_tokens=4), print)
    finally:
        engine.close()
    with under_profile("FULL"), pytest.raises(ConfigError, match="no pieces to stream"):
        next(stream_text(load_model("tiny", device="cpu", threads=1), "a", decoder={"name": "order_token_search"}))


def test_what_learns_from_trajectories_refuses_it():
    with pytest.raises(ConfigError, match="no single distribution"):
        generate(random_model(block_size=BLOCK), None, PROMPTS, OrderTokenSearch(), trajectories=True)
