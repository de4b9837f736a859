"""Threshold editing on hand-made logits: what is filled, what is edited, when a block ends."""

import json
from dataclasses import replace

import pytest
import torch

from decoding_stubs import MASK, VOCAB, ScriptedModel, StubTokenizer
from hildanext.core.errors import ConfigError, HildaError, UnknownChoice
from hildanext.core.registry import build, under_profile
from hildanext.decoding import (
    DECODERS,
    EFFORTS,
    MODES,
    Canvas,
    ThresholdEdit,
    decoder_section,
    make_decoder,
    mode_name,
)
from hildanext.decoding.trace import trace_record
from hildanext.detokenization import TokenCells
from hildanext.inference import GenerationConfig, generate
from hildanext.models.sampling import candidates, sample, uniforms

A, B, C, D, X, P, Q, R, S, EOS = range(1, 11)
PROMPT = [20, 21, 22, 23]

CASES = [
    {"name": "threshold_edit"},
    {"name": "threshold_edit", "tau_mask": 0.0, "tau_edit": 0.0, "max_post": 1},
    {"name": "threshold_edit", "tau_mask": 1.0, "tau_edit": None, "kv_safe": True},
    {"name": "threshold_edit", "tau_mask": 0.2, "tau_cautious": 0.9, "window": 1},
    {"name": "ordered"},
    {"name": "ordered", "order": "left_to_right", "per_step": 2, "top_k": 5, "temperature": 0.7},
    {"name": "ordered", "order": "confidence", "per_step": 3, "temperature": 0.7},
    {"name": "pruned", "temperature": 0.7},
    {"name": "pruned", "sure": 0.5, "per_step": 2},
    {"name": "s2d2"},
    {"name": "s2d2", "tau_mask": 0.2, "min_span": 2, "cost": 0.5, "temperature": 0.7},
    {"name": "residual", "untrained": True},
    {"name": "residual", "untrained": True, "tau_mask": 0.2, "tau_edit": 0.3, "top": 0, "start": "dirichlet"},
    {"name": "order_token_search", "beams": 2, "temperature": 0.7},
]


def toy_a(tokens, position):
    """Writes a x c y on an empty block, a b c d with less confidence while masks remain, sure of it after."""
    if all(token == MASK for token in tokens):
        return [(A, 0.9), (X, 0.6), (C, 0.8), (D + 20, 0.4)]
    if MASK in tokens:
        return [(A, 0.95), (B, 0.85), (C, 0.95), (D, 0.7)]
    return [(A, 0.97), (B, 0.96), (C, 0.98), (D, 0.96)]


def oscillator(tokens, position):
    """Writes p q r s, then for ever the other of p and q in the first place."""
    if MASK in tokens:
        return [(P, 0.9), (Q, 0.9), (R, 0.9), (S, 0.9)]
    return [(Q if tokens[0] == P else P, 0.9), (Q, 0.9), (R, 0.9), (S, 0.9)]


def decode(script, decoder, blocks=1, prompt=PROMPT, **settings):
    """One completion of `blocks` whole blocks."""
    settings = {"max_new_tokens": 4 * blocks, "trace": True} | settings
    return generate(ScriptedModel(script), None, [prompt], decoder, GenerationConfig(**settings))[0]


def pictures(completion):
    """The block's masks and letters before each forward, `_` for a mask."""
    letters = {A: "a", B: "b", C: "c", D: "d", X: "x"}
    cells, snapshots = dict.fromkeys(range(4, 8), "_"), []
    for step in completion.trace:
        snapshots.append("".join(cells[at] for at in range(4, 8)))
        cells |= {at: letters.get(new, "?") for at, new, _ in step.drafts}
        cells |= {at: letters.get(new, "?") for at, _, new, _ in step.edits}
    return snapshots


@pytest.mark.parametrize(
    ("tau", "committed"), [(0.95, [False, True, False]), (0.5, [False, True, False]), (0.2, [True, True, True])]
)
def test_fallback_and_strict_comparison(tau, committed):
    """c = (.3, .9, .5); nothing above .95 commits the best one, .5 is not above .5."""
    c = torch.tensor([0.3, 0.9, 0.5], dtype=torch.float64)
    logits = torch.stack([c.log(), (1 - c).mul(0.5).log(), (1 - c).mul(0.5).log()], -1)
    logits[2] = torch.tensor([0.0, 0.0, float("-inf")])  # a probability of exactly one half
    edit = ThresholdEdit(tau_mask=tau).edit(logits, torch.ones(1, 3, dtype=torch.bool), canvas([[MASK] * 3]))
    assert edit.write[0].tolist() == committed


def canvas(tokens, fixed=None, checks=0):
    tokens = torch.tensor(tokens)
    fixed = torch.zeros_like(tokens, dtype=torch.bool) if fixed is None else torch.tensor(fixed)
    uniform = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0))
    return Canvas(tokens, (tokens == MASK) & ~fixed, fixed, uniform, torch.full((len(tokens),), checks))


def test_a_probability_of_one_is_not_above_a_threshold_of_one():
    """Rounding makes sure tokens exactly 1: a threshold of 1 then still fills one mask at a time and edits nothing."""
    state = canvas([[A, A, MASK, MASK]])
    logits = torch.zeros(4, VOCAB)
    logits[:, B] = 200.0
    where = torch.ones(1, 4, dtype=torch.bool)
    edit = ThresholdEdit(tau_mask=1.0, tau_edit=1.0).edit(logits, where, state)
    assert edit.confidence.eq(1.0).all() and edit.write[0].tolist() == [False, False, True, False]
    surer = ThresholdEdit(tau_mask=0.99, tau_edit=0.99).edit(logits, where, state)
    assert surer.write.all()


def test_equal_confidences_commit_the_lowest_position():
    logits = torch.zeros(4, VOCAB, dtype=torch.float64)
    edit = ThresholdEdit(tau_mask=0.9).edit(logits, torch.ones(1, 4, dtype=torch.bool), canvas([[MASK] * 4]))
    assert edit.write[0].tolist() == [True, False, False, False]


TOY_A = [
    ({"tau_mask": 0.5, "tau_edit": 0.0}, ["____", "axc_", "abcd"], [A, B, C, D]),
    ({"tau_mask": 0.7, "tau_edit": 0.5}, ["____", "a_c_", "abc_", "abcd"], [A, B, C, D]),
    ({"tau_mask": 0.95, "tau_edit": 0.9}, ["____", "a___", "a_c_", "abc_", "abcd"], [A, B, C, D]),
    ({"tau_mask": 0.5, "tau_edit": None}, ["____", "axc_", "axcd"], [A, X, C, D]),
    ({"tau_mask": 0.5, "tau_edit": 1.0}, ["____", "axc_", "axcd"], [A, X, C, D]),
    ({"tau_mask": 0.5, "tau_edit": 0.0, "max_post": 0}, ["____", "axc_"], [A, B, C, D]),
]


@pytest.mark.parametrize(("knobs", "trace", "final"), TOY_A)
def test_toy_a(knobs, trace, final):
    """The trace, the tokens and the number of forwards of every row of the table."""
    done = decode(toy_a, ThresholdEdit(**knobs))
    assert pictures(done) == trace
    assert done.tokens == final
    assert done.stats.denoise_forwards == len(trace)


def test_toy_a_with_the_kv_safe_ending():
    """Only the budget of 0 costs a forward more; the stable rows end with one that changed nothing anyway."""
    for knobs, trace, final in TOY_A:
        done = decode(toy_a, ThresholdEdit(**knobs, kv_safe=True))
        assert done.tokens == final
        assert done.stats.denoise_forwards == len(trace) + (knobs.get("max_post") == 0)


def test_the_diffusers_quirks_are_knobs_here():
    """Its block ends after 4 forwards with no editing pass at (.95, .9), and its 0.0 switches editing off."""
    assert decode(toy_a, ThresholdEdit(tau_mask=0.95, tau_edit=0.9, max_post=0)).stats.denoise_forwards == 4
    assert decode(toy_a, ThresholdEdit(tau_mask=0.5, tau_edit=None, max_post=0)).tokens == [A, X, C, D]
    assert decode(toy_a, ThresholdEdit(tau_mask=0.5, tau_edit=0.0)).tokens == [A, B, C, D]


@pytest.mark.parametrize(
    ("knobs", "forwards", "safe"), [({"max_post": 16}, 17, 18), ({"max_post": 2}, 3, 4), ({"tau_edit": 1.0}, 2, 2)]
)
def test_oscillation_ends_with_the_budget(knobs, forwards, safe):
    """The same tokens with the KV-safe ending, one forward more where the budget ended the block."""
    for kv_safe, count in ((False, forwards), (True, safe)):
        done = decode(oscillator, ThresholdEdit(**({"tau_mask": 0.5, "tau_edit": 0.0} | knobs), kv_safe=kv_safe))
        assert done.tokens == [P, Q, R, S]
        assert done.stats.denoise_forwards == count


def test_oscillation_over_several_blocks_stays_in_bounds():
    """At most block + max_post forwards for each block, one more with the KV-safe ending."""
    for kv_safe in (False, True):
        done = decode(oscillator, ThresholdEdit(tau_mask=1.0, tau_edit=0.0, max_post=3, kv_safe=kv_safe), blocks=5)
        assert done.stats.denoise_forwards <= 5 * (4 + 3 + kv_safe)


def test_speed_and_quality():
    """S has the lower thresholds and needs no more forwards on toy A; its alias is "speed"."""
    s, q = MODES["S_MODE"], MODES["Q_MODE"]
    assert (s["tau_mask"], s["tau_edit"], s["max_post"]) == (0.5, 0.0, 16)
    assert (q["tau_mask"], q["tau_edit"], q["max_post"]) == (0.7, 0.5, 16)
    assert s["tau_mask"] < q["tau_mask"] and s["tau_edit"] < q["tau_edit"]
    forwards = [decode(toy_a, make_decoder(decoder_section(mode))).stats.forwards for mode in ("speed", "quality")]
    assert forwards[0] <= forwards[1]
    assert (mode_name("speed"), mode_name("quality"), mode_name("s_mode")) == ("S_MODE", "Q_MODE", "S_MODE")
    with pytest.raises(UnknownChoice, match="choices"):
        mode_name("speedy")


def test_an_edit_waits_for_the_step_after_the_fill():
    """A token cannot be edited in the step that committed it, and is edited while masks remain."""
    done = decode(toy_a, ThresholdEdit(tau_mask=0.5, tau_edit=0.0))
    first, second = done.trace[:2]
    assert [at for at, *_ in first.drafts] == [4, 5, 6] and not first.edits
    assert [(at, old, new) for at, old, new, _ in second.edits] == [(5, X, B)]
    assert second.masks == [7]


def test_end_of_text_counts_only_when_everything_before_it_is_final():
    """An EOS behind a mask does not stop, nor one edited away; the cut is inclusive."""

    def early(tokens, position):
        sure = [(A, 0.2), (EOS, 0.9), (C, 0.9), (D, 0.9)]
        return sure if all(token == MASK for token in tokens) else [(A, 0.9), (EOS, 0.9), (C, 0.9), (D, 0.9)]

    def edited_away(tokens, position):
        if position == 8:
            return [(A, 0.9), (B, 0.9), (EOS, 0.9), (D, 0.9)]
        return [(A, 0.9), (EOS if MASK in tokens else B, 0.9), (C, 0.9), (D, 0.9)]

    model = ScriptedModel(early)
    done = generate_with_eos(model, ThresholdEdit(tau_mask=0.5, tau_edit=0.0))
    assert done.tokens == [A, EOS] and done.finish_reason == "eos"
    assert done.trace[0].drafts[0][0] == 5 and done.trace[1].masks == [4] and len(done.trace) == 3
    model = ScriptedModel(edited_away)
    done = generate_with_eos(model, ThresholdEdit(tau_mask=0.5, tau_edit=0.0))
    assert done.tokens == [A, B, C, D, A, B, EOS] and done.finish_reason == "eos"
    assert generate_with_eos(model, ThresholdEdit(tau_mask=0.5, tau_edit=None)).tokens == [A, EOS]


def generate_with_eos(model, decoder, **settings):
    settings = {"max_new_tokens": 12, "trace": True} | settings
    return generate(model, StubTokenizer(eos=EOS), [PROMPT], decoder, GenerationConfig(**settings))[0]


def test_end_of_text_can_be_ignored():
    done = generate_with_eos(ScriptedModel(lambda *_: [(EOS, 0.9)] * 4), ThresholdEdit(), ignore_eos=True)
    assert done.tokens == [EOS] * 12 and done.finish_reason == "length"


def test_stop_strings_cut_the_text_and_what_streams():
    """The text ends before the stop string, the tokens with the one that completes it; nothing of it is streamed."""
    seen = []
    settings = GenerationConfig(max_new_tokens=12, stop=("3 4 1", "zzz"))
    done = generate(
        ScriptedModel(toy_a),
        StubTokenizer(eos=EOS),
        [PROMPT],
        ThresholdEdit(),
        settings,
        lambda event: seen.append(event),
    )[0]
    assert done.text == "1 2 " and done.finish_reason == "stop"
    assert done.tokens == [A, B, C, D, A]
    assert "".join(event.text for event in seen if event.kind == "text") == done.text
    assert [event.kind for event in seen][-1] == "end"


def test_streamed_text_adds_up():
    seen = []
    done = generate(
        ScriptedModel(toy_a),
        StubTokenizer(eos=EOS),
        [PROMPT],
        ThresholdEdit(),
        GenerationConfig(max_new_tokens=9),
        seen.append,
    )[0]
    assert "".join(event.text for event in seen if event.kind == "text") == done.text == "1 2 3 4 1 2 3 4 1 "


def test_a_trace_is_json_with_probabilities():
    done = decode(toy_a, ThresholdEdit(tau_mask=0.5, tau_edit=0.0))
    record = json.loads(json.dumps(trace_record(done.trace, TokenCells(StubTokenizer(eos=EOS), PROMPT))))
    edit = record["steps"][1]["edits"][0]
    assert (edit["position"], edit["old"], edit["new"], edit["old_text"]) == (5, X, B, "5 ")
    assert edit["probability"] == 0.85
    assert [step["final"] for step in record["steps"]] == [False, False, True]


@pytest.mark.parametrize("case", CASES, ids=json.dumps)
def test_every_decoder_fills_every_mask_and_leaves_the_prompt(case):
    """Contract of the table: runs to the end, writes no mask, keeps the prompt's part of a block."""
    with under_profile("FULL"):
        decoder = build("decoder", DECODERS, case)
    prompt = [20, 21, 22, 23, 24, 25]  # a scripted model has no keys whose room could be counted
    done = decode(toy_a, decoder, blocks=3, prompt=prompt, max_new_tokens=10, cached=not decoder.searches)
    assert len(done.tokens) == 10 and MASK not in done.tokens
    assert all(at >= 6 for step in done.trace for at, *_ in [*step.drafts, *step.edits])


def test_every_row_of_the_table_has_a_case():
    assert {case["name"] for case in CASES} == set(DECODERS)


@pytest.mark.parametrize("wrong", [{"tau_mask": 1.5}, {"tau_mask": -0.1}, {"tau_edit": 2}, {"tau_cautious": -1}])
def test_a_threshold_outside_its_range_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"is (above 1|below 0), give 0 to 1"):
        make_decoder({"name": "threshold_edit", **wrong})


@pytest.mark.parametrize("large", [{"max_post": 1025}, {"window": 4096}, {"temperature": 100.5}])
def test_what_a_request_may_not_ask_for_a_configuration_may(large):
    assert vars(make_decoder({"name": "threshold_edit", **large})).items() >= large.items()


@pytest.mark.parametrize(
    "wrong",
    [{"tau_maks": 0.5}, {"tau_mask": "high"}, {"temperature": -1}, {"top_p": 0}, {"top_k": 0}, {"max_post": -1}]
    + [{"window": 1, "tau_edit": None}],
)
def test_a_wrong_knob_is_refused(wrong):
    with pytest.raises(HildaError):
        make_decoder({"name": "threshold_edit", **wrong})


def test_every_effort_builds_over_every_mode():
    for mode in MODES.keys() - {"exact"}:
        for effort in EFFORTS:
            make_decoder(decoder_section(mode, effort))
    with pytest.raises(UnknownChoice):
        decoder_section("S_MODE", "maximum")
    with pytest.raises(ConfigError, match="efforts lie over the modes of a diffusion model"):
        decoder_section("exact", next(iter(EFFORTS)))


def test_editing_off_is_none_and_zero_edits_on_any_disagreement():
    state = canvas([[A, A, MASK, A]], [[True, False, False, False]])
    where = torch.ones(1, 4, dtype=torch.bool)
    logits = torch.zeros(4, VOCAB, dtype=torch.float64)
    logits[:, B] = 1e-3
    off, zero = ThresholdEdit(tau_edit=None), ThresholdEdit(tau_edit=0.0)
    assert off.edit(logits, where, state).write[0].tolist() == [False, False, True, False]
    assert zero.edit(logits, where, state).write[0].tolist() == [False, True, True, True]
    assert off.needs(state)[0].tolist() == [False, False, True, False]
    assert zero.needs(state)[0].tolist() == [False, True, True, True]


def test_a_lower_threshold_fills_a_superset():
    logits = torch.randn(8, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    state = canvas([[MASK] * 8])
    writes = [ThresholdEdit(tau_mask=tau).edit(logits, state.masked, state).write for tau in (0.0, 0.2, 0.5, 0.9)]
    assert all((~low).logical_and(high).sum() == 0 for low, high in zip(writes, writes[1:], strict=False))
    assert writes[0].sum() > writes[-1].sum()


def test_cautious_threshold_falls_as_the_masks_get_sure():
    """With mean confidence m the threshold is .95 + m (.5 - .95)."""
    decoder = ThresholdEdit(tau_mask=0.5, tau_cautious=0.95, tau_edit=None)

    def fills(confidences):
        c = torch.tensor(confidences, dtype=torch.float64)
        rest = ((1 - c) / (VOCAB - 1)).log()[:, None].repeat(1, VOCAB)
        rest[:, A] = c.log()
        state = canvas([[MASK] * len(confidences)])
        return decoder.edit(rest, state.masked, state).write[0].tolist()

    assert fills([0.7, 0.9, 0.9, 0.9]) == [True] * 4  # mean .85, threshold .5675
    assert fills([0.7, 0.1, 0.1, 0.9]) == [False, False, False, True]  # mean .45, threshold .7475


def test_greedy_confidence_is_the_softmax_in_fp32():
    logits = torch.randn(5, VOCAB) * 4
    tokens, confidence = candidates(logits, torch.zeros(5))
    expected, best = logits.double().softmax(-1).max(-1)
    assert torch.equal(tokens, best) and confidence.dtype == torch.float32
    torch.testing.assert_close(confidence.double(), expected, atol=1e-6, rtol=0)


def test_sampling_follows_the_distribution_and_its_filters():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log().expand(20000, 4)
    draws = uniforms(0, 20000)

    def frequencies(**knobs):
        tokens, confidence = candidates(logits, draws, 1.0, **knobs)
        torch.testing.assert_close(confidence, logits.exp().gather(-1, tokens[:, None])[:, 0])
        return (tokens.bincount(minlength=4) / 20000).tolist()

    assert frequencies() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.01)
    assert frequencies(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.01)
    assert frequencies(top_p=0.79) == pytest.approx([0.625, 0.375, 0, 0], abs=0.01)
    assert frequencies(top_p=0.5) == pytest.approx([1, 0, 0, 0])
    assert frequencies(top_k=3, top_p=0.8) == pytest.approx([0.625, 0.375, 0, 0], abs=0.01)
    cold = candidates(logits, draws, 0.05)[0].bincount(minlength=4)
    assert cold[0] > 19990


def test_the_nucleus_ends_with_the_token_that_reaches_it():
    """Four tokens of exactly a quarter: half of the mass is two of them, a bit more is three."""
    logits, draws = torch.zeros(4000, 4, dtype=torch.float64), uniforms(2, 4000)

    def drawn(top_p):
        return sample(logits, draws, 1.0, top_p).unique().tolist()

    assert (drawn(0.25), drawn(0.5), drawn(0.5 + 1e-9), drawn(1.0)) == ([0], [0, 1], [0, 1, 2], [0, 1, 2, 3])


def test_of_equal_logits_the_lowest_ids_are_among_the_k_highest():
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0, 1.0]]).expand(4000, 6)
    kept = {1: [1], 2: [1, 2], 3: [1, 2, 4], 4: [0, 1, 2, 4], 6: [0, 1, 2, 3, 4, 5], 9: [0, 1, 2, 3, 4, 5]}
    for k, ids in kept.items():
        assert sample(logits, uniforms(k, 4000), 5.0, None, k).unique().tolist() == ids
    last = torch.tensor([[1.0, 1.0, 1.0, 2.0]]).expand(4000, 4)
    assert sample(last, uniforms(0, 4000), 5.0, None, 2).unique().tolist() == [0, 3]


def test_two_tokens_that_swap_ranks_leave_the_draws_of_the_others_alone():
    draws = uniforms(3, 4000)
    before = torch.tensor([0.3, 0.3 + 1e-9, 0.2, 0.1, 0.1], dtype=torch.float64).log().expand(4000, 5)
    after = before[:, [1, 0, 2, 3, 4]]
    for filters in ((None, None), (0.95, None), (None, 4), (0.85, 4)):
        assert torch.equal(sample(before, draws, 1.0, *filters), sample(after, draws, 1.0, *filters))


def test_a_filter_changes_only_what_it_cuts():
    logits = torch.randn(2000, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    draws = uniforms(4, 2000)
    plain = sample(logits, draws, 1.0)
    for filters in ((1.0, None), (None, 30)):
        assert torch.equal(sample(logits, draws, 1.0, *filters), plain)
    nearly = sample(logits, draws, 1.0, 1 - 1e-9)
    assert (nearly == plain).float().mean() > 0.999


def test_a_banned_token_is_never_sampled():
    logits = torch.full((1000, 4), float("-inf"))
    logits[:, 1] = 0.0
    assert (candidates(logits, uniforms(1, 1000), 1.0)[0] == 1).all()


def test_the_kv_safe_last_forward_only_confirms():
    state = replace(canvas([[A, A]]), checks=torch.tensor([16]))
    logits = torch.zeros(2, VOCAB, dtype=torch.float64)
    logits[:, B] = 9.0
    edit = ThresholdEdit(tau_edit=0.0, kv_safe=True).edit(logits, state.editable, state)
    assert not edit.write.any() and edit.final.all()
