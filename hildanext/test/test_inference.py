"""Cached decoding equals uncached decoding, whatever the prompt's length, the batch and the way of committing."""

from functools import cache

import pytest
import torch

from conftest import random_model
from decoding_stubs import MARGIN, MASK, ScriptedModel, StubTokenizer, Watched
from hildanext.ar import Parent
from hildanext.core.errors import PromptError
from hildanext.decoding import ThresholdEdit
from hildanext.decoding.base import run as decode
from hildanext.decoding.state import DecodeState
from hildanext.inference import GenerationConfig, context_length, generate
from small_models import small_tokenizer

FAMILIES = ["llama", "qwen2", "qwen3"]
ALIGNMENTS = ["block", "parent"]
BLOCK, BLOCKS, SEEDS = 4, 3, 54
LENGTHS = [1, 2, 3, 4, 5, 7, 8, 9]
TAUS = [0.2, 0.5, 1.0]  # 1 with a strict comparison is the 1.1 of the vectors: nothing passes


def prompt_of(length, seed):
    return torch.randint(0, 60, (length,), generator=torch.Generator().manual_seed(1000 + seed)).tolist()


def run(model, prompts, knobs, **settings):
    """Completions and the closest call of any decision."""
    decoder = Watched(ThresholdEdit(**knobs))
    settings = {"max_new_tokens": BLOCK * BLOCKS, "debug": True} | settings
    return generate(model, None, prompts, decoder, GenerationConfig(**settings)), decoder


@cache
def drawn(alignment, case, tau_edit):
    """A model, a prompt and its uncached completion, from the first seed of the case that decides by a margin."""
    family, tau, length = FAMILIES[case % 3], TAUS[case // 3 % 3], LENGTHS[case % len(LENGTHS)]
    knobs = {"tau_mask": tau, "tau_edit": tau_edit, "max_post": 3}
    for seed in range(case, case + 10 * SEEDS, SEEDS):
        model = random_model(family, alignment, BLOCK, seed=seed, layers=2)
        prompt = prompt_of(length, seed)
        done, watch = run(model, [prompt], knobs, cached=False)
        if watch.margin > MARGIN:
            return model, prompt, knobs, done[0], watch
    raise AssertionError("no seed with a margin")


@pytest.mark.parametrize("case", range(SEEDS))
@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_cached_equals_uncached_without_editing(alignment, case):
    """Token for token, with the same number of denoising forwards."""
    model, prompt, knobs, slow, _ = drawn(alignment, case, None)
    fast = run(model, [prompt], knobs)[0][0]
    assert fast.tokens == slow.tokens
    assert fast.stats.denoise_forwards == slow.stats.denoise_forwards


@pytest.mark.parametrize("case", range(SEEDS))
@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_cached_equals_uncached_with_editing(alignment, case):
    """Local edits, prompts shorter than a block, straddling one, exactly k blocks.

    A separate commit gives the same tokens for one forward more per block but the last.
    """
    model, prompt, knobs, slow, watch = drawn(alignment, case, 0.3)
    auto, fused, separate = (run(model, [prompt], knobs, commit=c)[0][0] for c in ("auto", "fused", "separate"))
    assert auto.tokens == fused.tokens == separate.tokens == slow.tokens
    assert auto.stats.edits == slow.stats.edits == watch.had_edits
    assert auto.stats.prefill_forwards == (len(prompt) >= BLOCK)
    assert auto.stats.forwards == fused.stats.forwards
    blocks = -(-(len(prompt) + BLOCK * BLOCKS) // BLOCK) - len(prompt) // BLOCK
    assert separate.stats.forwards - fused.stats.forwards == separate.stats.commit_forwards == blocks - 1
    assert slow.stats.denoise_forwards <= blocks * (BLOCK + knobs["max_post"])


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_the_kv_safe_ending_changes_no_token(alignment):
    """At most one forward more per block."""
    longer = 0
    for case in range(0, SEEDS, 3):
        model, prompt, knobs, slow, _ = drawn(alignment, case, 0.3)
        safe = run(model, [prompt], knobs | {"kv_safe": True})[0][0]
        assert safe.tokens == slow.tokens
        assert 0 <= safe.stats.denoise_forwards - slow.stats.denoise_forwards <= BLOCKS + 1
        longer += safe.stats.denoise_forwards > slow.stats.denoise_forwards
    assert longer > 0


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_the_cases_are_harsh_enough(alignment):
    """There are edits in plenty, and some blocks end with their budget, others stable."""
    done = [drawn(alignment, case, 0.3)[3].stats for case in range(SEEDS)]
    assert sum(stats.edits for stats in done) > 2 * SEEDS
    assert len({stats.denoise_forwards for stats in done}) > 5


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_masks_never_come_back(alignment):
    """Within a block the number of masks falls until none is left."""
    for seed in range(9):
        model = random_model(FAMILIES[seed % 3], alignment, BLOCK, seed=seed)
        knobs = {"tau_mask": 0.4, "tau_edit": 0.0, "max_post": 3}
        done = run(model, [prompt_of(3, seed)], knobs, trace=True)[0][0]
        for one, other in zip(done.trace, done.trace[1:], strict=False):
            if one.start == other.start:
                assert set(other.masks) < set(one.masks) or not one.masks
                assert set(one.masks) - set(other.masks) == {at for at, *_ in one.drafts}


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("commit", ["auto", "fused", "separate"])
def test_a_row_does_not_depend_on_its_neighbours(alignment, commit):
    """A batch of different lengths equals single runs: tokens, forwards, edits, also when sampling."""
    for seed in range(6):
        model = random_model(FAMILIES[seed % 3], alignment, BLOCK, seed=seed, layers=2)
        prompts = [prompt_of(length, seed) for length in (1, 9, 4, 6)]
        knobs = {"tau_mask": TAUS[seed % 3], "tau_edit": 0.3, "max_post": 2, "temperature": (0.0, 0.7)[seed % 2]}
        batch, watch = run(model, prompts, knobs, commit=commit)
        if watch.margin < MARGIN:
            continue
        for row, prompt in enumerate(prompts):
            alone = run(model, [prompt], knobs, commit=commit, seed=row)[0][0]
            assert alone.tokens == batch[row].tokens
            for field in ("prefill", "denoise", "commit"):
                name = f"{field}_forwards"
                assert getattr(alone.stats, name) == getattr(batch[row].stats, name)


def test_small_batches_equal_one_large_one():
    model = random_model("qwen3", "parent", BLOCK)
    prompts = [prompt_of(length, 7) for length in (3, 5, 8)]
    knobs = {"tau_mask": 0.4, "temperature": 0.9}
    large, small = (run(model, prompts, knobs, batch_size=size)[0] for size in (8, 2))
    assert [done.tokens for done in large] == [done.tokens for done in small]


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_editing_finished_blocks_is_exact_with_the_cache(alignment):
    """In the loop: truncate at the lowest edited block and run again equals running everything from 0."""
    revised = 0
    for seed in range(15):
        model = random_model(FAMILIES[seed % 3], alignment, BLOCK, seed=seed, layers=2)
        knobs = {"tau_mask": 0.3, "tau_edit": 0.2, "max_post": 2, "window": 2}
        prompt = prompt_of(5, seed)
        slow, watch = run(model, [prompt], knobs, cached=False, trace=True)
        if watch.margin < MARGIN:
            continue
        for commit in ("auto", "separate"):
            fast = run(model, [prompt], knobs, commit=commit)[0][0]
            assert fast.tokens == slow[0].tokens
            assert fast.stats.revise_forwards == slow[0].stats.revise_forwards > 0
        steps = [step for step in slow[0].trace if step.kind == "revise"]
        assert all(at >= len(prompt) for step in steps for at, *_ in step.edits)
        revised += sum(len(step.edits) > 0 for step in steps)
    assert revised > 5


def test_shown_text_is_not_revised():
    """With a window the text waits until its block can no longer change."""

    model = random_model("llama", "block", BLOCK, seed=4, layers=2)
    seen = []
    decoder = ThresholdEdit(tau_mask=0.3, tau_edit=0.2, max_post=2, window=1)
    settings = GenerationConfig(max_new_tokens=20)
    done = generate(model, StubTokenizer(letters=True), [[1, 2, 3, 4]], decoder, settings, seen.append)[0]
    assert "".join(event.text for event in seen if event.kind == "text") == done.text


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_forwards_are_accounted_exactly(alignment):
    """The counts add up to the calls of the model; tokens per forward leaves the prefill out."""
    for commit in ("auto", "separate"):
        for window in (0, 1):
            model = random_model("llama", alignment, BLOCK, seed=window)
            calls = []
            model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            knobs = {"tau_mask": 0.4, "tau_edit": 0.3, "max_post": 2, "window": window}
            stats = run(model, [prompt_of(9, 1)], knobs, commit=commit)[0][0].stats
            assert stats.forwards == len(calls)
            assert stats.prefill_forwards == 1 and (stats.commit_forwards > 0) == (commit == "separate")
            assert stats.tokens_per_forward == stats.tokens / (len(calls) - 1)


def test_the_mask_and_unused_rows_are_never_written():
    """A model whose raw logits put the mask (or an unused row) first everywhere still ends, without it."""
    for alignment in ALIGNMENTS:
        model = random_model("llama", alignment, BLOCK, vocab=50)
        head = torch.nn.Linear(32, 64, dtype=torch.float64)
        torch.nn.init.zeros_(head.weight)
        with torch.no_grad():
            head.bias.copy_(torch.arange(64) * 0.01)
            head.bias[50:] = 99.0
        model.causal_lm.set_output_embeddings(head)
        done = run(model, [[1, 2]], {"tau_mask": 0.5, "tau_edit": 0.0})[0][0]
        assert len(done.tokens) == 12 and max(done.tokens) < 50


@pytest.mark.parametrize(
    ("prompt", "new", "capacity", "start", "inside"), [(33, 20, 64, 32, 1), (32, 32, 64, 32, 0), (1, 31, 32, 0, 1)]
)
def test_the_grid_starts_at_position_0(prompt, new, capacity, start, inside):
    """Blocks, canvas and the prompt tokens of the first active block."""
    model = random_model("llama", "block", 32, layers=1)
    session = DecodeState(model, [prompt_of(prompt, 0)], [prompt + new], lambda *_: False)
    session.prefill()
    assert (len(session.rows[0].tokens), session.rows[0].start) == (capacity, start)
    assert int(session.canvas().fixed.sum()) == inside


def test_the_prompt_survives_a_model_that_disagrees_everywhere():
    """Bit-identical although every position prefers another token and tau_edit is 0; nothing is written from G on."""
    model = ScriptedModel(lambda tokens, position: [(30, 0.9)] * 32, block_size=32)
    prompt = list(range(33 - 4)) + [1, 2, 3, 4]
    finals = []

    def ended(row, tokens):
        finals.append(tokens)
        return False

    session = DecodeState(model, [prompt], [53], ended)
    session.prefill()
    decode(ThresholdEdit(tau_mask=0.5, tau_edit=0.0), session)
    assert finals[-1][:33] == prompt and finals[-1][33:] == [30] * 20 + [MASK] * 11
    done = generate(model, None, [prompt], ThresholdEdit(), GenerationConfig(max_new_tokens=20))[0]
    assert done.tokens == [30] * 20 and done.finish_reason == "length"


@pytest.mark.parametrize(("shift", "expected"), [("none", [4, 5, 6, 7]), ("left", [3, 4, 5, 6])])
def test_where_a_prediction_is_read(shift, expected):
    """Logits that spell their own position: no shift predicts i at i, the left shift i-1 at i (0 keeps 0)."""
    model = ScriptedModel(lambda tokens, position: [(position + i, 0.9) for i in range(4)])
    clean_mask = "token_causal" if shift == "left" else "block_causal"
    model.card = type(model.card)(
        mask_id=MASK, vocab_rows=40, vocab_real=MASK, block_size=4, shift=shift, clean_mask=clean_mask
    )
    session = DecodeState(model, [[1, 2, 3, 4]], [8], lambda *_: False)
    session.prefill()
    where = session.canvas().masked
    assert session.logits(where).argmax(-1).tolist() == expected
    empty = DecodeState(model, [[1]], [4], lambda *_: False)
    where = torch.ones_like(empty.canvas().masked)
    assert empty.logits(where).argmax(-1).tolist() == [0, *(at - 4 for at in expected[1:])]


@pytest.mark.parametrize("family", FAMILIES)
def test_block_size_1_is_the_autoregressive_parent(family):
    """`parent` alignment: greedy decoding equals the parent's own, and no forward is spent on a mask."""
    model = random_model(family, "parent", 1)
    parent = Parent(model.causal_lm, small_tokenizer(), banned=model.banned)
    for seed in range(5):
        prompt = prompt_of(5, seed)
        theirs = parent.generate(prompt, 12, stop_ids=[])
        ours = run(model, [prompt], {"tau_mask": 0.9, "tau_edit": None, "max_post": 0})[0][0]
        assert ours.tokens == theirs.tokens
        assert ours.stats.forwards == theirs.stats.forwards


def test_sampling_repeats_with_its_seed_and_only_with_it():
    model = random_model("llama", "block", BLOCK)
    knobs = {"tau_mask": 0.3, "temperature": 1.5, "top_k": 40, "top_p": 0.95}
    texts = [tuple(run(model, [[1, 2]], knobs, seed=seed)[0][0].tokens) for seed in (0, 0, 1, 2)]
    assert texts[0] == texts[1] and len(set(texts)) == 3


def test_top_k_1_and_a_tiny_top_p_are_greedy():
    model = random_model("qwen2", "parent", BLOCK)
    plain, k, p = (
        run(model, [[3, 4]], {"tau_mask": 0.3, **knobs})[0][0].tokens
        for knobs in ({}, {"temperature": 0.8, "top_k": 1}, {"temperature": 0.8, "top_p": 1e-6})
    )
    assert plain == k == p


def test_a_long_prompt_is_prefilled_in_pieces(monkeypatch):
    monkeypatch.setattr("hildanext.decoding.feed_plan.PREFILL_TOKENS", 16)
    for alignment in ALIGNMENTS:
        model = random_model("llama", alignment, BLOCK)
        prompts = [prompt_of(50, 1), prompt_of(21, 2)]
        fast = run(model, prompts, {"tau_mask": 0.4, "max_post": 2})[0]
        slow = run(model, prompts, {"tau_mask": 0.4, "max_post": 2}, cached=False)[0]
        assert [done.tokens for done in fast] == [done.tokens for done in slow]
        assert [done.stats.prefill_forwards for done in fast] == [3, 2]


def test_prompts_that_cannot_be_answered():
    """Longer than the context, too many new tokens, ids that are no tokens, nothing at all: each says what to do."""
    model = random_model("llama", "block", BLOCK)
    context = context_length(model)
    assert context == 512
    wrong = [
        ([1] * context, {}, "shorten it to 511"),
        ([1] * 500, {"max_new_tokens": 13}, "at most 12 new tokens"),
        ([model.card.mask_id], {}, "encode it"),
        ([64], {}, "encode it"),
        ([-1], {}, "encode it"),
        ([], {}, "at least one token"),
    ]
    for prompt, settings, hint in wrong:
        with pytest.raises(PromptError, match=hint):
            generate(model, None, [prompt], ThresholdEdit(), GenerationConfig(**settings))
    done = generate(model, None, [[1] * 510], ThresholdEdit(tau_edit=None), GenerationConfig())[0]
    assert len(done.tokens) == 2


def test_an_empty_prompt_starts_from_the_beginning_of_text():
    model = random_model("llama", "parent", BLOCK)
    knobs = GenerationConfig(max_new_tokens=6)
    empty, explicit = generate(model, StubTokenizer(bos=5), [[], [5]], ThresholdEdit(), knobs)
    assert empty.tokens == explicit.tokens and len(empty.tokens) == 6


def test_a_completion_is_handed_over_when_its_row_ends_and_seeds_may_be_given():
    model = random_model(seed=2)
    prompts, seeds = [prompt_of(5, 0), prompt_of(3, 1), prompt_of(6, 2)], [7, 70, 700]
    decoder = ThresholdEdit(tau_mask=0.5, temperature=1.0)
    results: dict[int, object] = {}
    settings = GenerationConfig(max_new_tokens=8, batch_size=2)
    done = generate(model, None, prompts, decoder, settings, None, results.__setitem__, seeds)
    assert sorted(results) == [0, 1, 2] and all(results[row] is completion for row, completion in enumerate(done))
    for prompt, seed, completion in zip(prompts, seeds, done, strict=True):
        alone = generate(model, None, [prompt], decoder, GenerationConfig(max_new_tokens=8, seed=seed))[0]
        assert alone.tokens == completion.tokens
