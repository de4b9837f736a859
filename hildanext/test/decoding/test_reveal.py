"""Rules of filling, on hand-made probabilities and on small random models: CV-14 to CV-16, CV-24, CV-33."""

from dataclasses import replace

import pytest
import torch

from conftest import random_model
from decoding_stubs import MASK, VOCAB, ScriptedModel
from hildanext.core.errors import ConfigError, UnknownChoice
from hildanext.core.registry import under_profile
from hildanext.decoding import Canvas, Decoder, Edit, ThresholdEdit, decoder_section, make_decoder
from hildanext.decoding.base import fill_above
from hildanext.decoding.per_row import PerRow
from hildanext.decoding.reveal import REVEALS, Facts
from hildanext.decoding.reveal.base import entropies
from hildanext.inference import GenerationConfig, generate

CASES = [
    {"name": "threshold"},
    {"name": "factor", "f": 1.5},
    {"name": "entropy_bound", "gamma": 1.0},
    {"name": "klass", "epsilon": 0.5, "history": 1},
    {"name": "credit", "entries": 2},
    {"name": "hierarchical", "low": 0.1},
    {"name": "card", "run": True, "most": 3},
]
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]


def test_every_rule_has_a_case():
    assert {case["name"] for case in CASES} == set(REVEALS)


def canvas(masked, memory=()):
    masked = torch.tensor(masked)
    tokens = torch.where(masked, MASK, 1)
    uniform = torch.zeros(masked.shape, dtype=torch.float64)
    checks = torch.zeros(len(masked), dtype=torch.int64)
    return Canvas(tokens, masked, torch.zeros_like(masked), uniform, checks, memory=memory)


def logits_of(confidence, token=2):
    """Rows whose likeliest token has that probability, the rest spread evenly over the others."""
    p = torch.tensor(confidence, dtype=torch.float64)[:, None]
    rows = ((1 - p) / (VOCAB - 2)).log().expand(-1, VOCAB).clone()
    rows[:, MASK] = float("-inf")
    rows[:, token] = p[:, 0].log()
    return rows


def filled(section, confidence, masked=None, **knobs):
    """Places that one step of a fresh block fills; every mask has a confidence."""
    masked = [[True] * len(confidence)] if masked is None else [masked]
    with under_profile("FULL"):
        decoder = ThresholdEdit(**{"tau_edit": None, "reveal": section} | knobs)
    state = canvas(masked)
    edit = decoder.edit(logits_of([c for c, m in zip(confidence, masked[0], strict=True) if m]), state.masked, state)
    return edit.write[0].nonzero()[:, 0].tolist()


def test_factor_fills_the_first_two_of_CV_24():
    """Bounds .85, .90, .925, .94; with f 0 the surest alone."""
    c = [0.99, 0.96, 0.9, 0.5]
    assert filled({"name": "factor", "f": 0.3}, c) == [0, 1]
    assert filled({"name": "factor", "f": 0.0}, c) == [0]
    assert filled({"name": "factor", "f": 0.3}, [0.5, 0.99, 0.9, 0.96]) == [1, 3]
    assert filled({"name": "factor", "f": 0.3}, [0.1, 0.2, 0.15]) == [1], "the first is always filled"
    assert filled({"name": "factor", "f": float("inf")}, c) == [0, 1, 2, 3]
    # c = .9, .9: 1 - 1/3 <= .9 and 1 - .3/2 <= .9, and at equality too
    assert filled({"name": "factor", "f": 0.3}, [0.85, 0.5]) == [0]
    assert filled({"name": "factor", "f": 0.30000001}, [0.90000001, 0.9]) == [0, 1]


def test_the_entropy_bound_counts_all_but_the_highest():
    state = canvas([[True] * 4, [True, False, True, True]])
    entropy = torch.tensor([[0.3, 0.1, 0.05, 0.2], [0.3, 9.0, 0.05, 0.0]], dtype=torch.float64)
    facts = Facts(torch.zeros(2, 4), 0.7, entropy.masked_fill(~state.masked, torch.inf), None)

    def fill(gamma):
        return [
            row.nonzero()[:, 0].tolist() for row in REVEALS["entropy_bound"](gamma=gamma).reveal(facts, state, ())[0]
        ]

    assert fill(0.0) == [[2], [2, 3]], "one, and what has no entropy"
    assert fill(0.05) == [[1, 2], [0, 2, 3]]  # 0 + .05, then .05 + .1 is above; 0 + .05
    assert fill(0.1499) == [[1, 2], [0, 2, 3]] and fill(0.1501) == [[1, 2, 3], [0, 2, 3]]
    assert fill(float("inf")) == [[0, 1, 2, 3], [0, 2, 3]]


def test_entropies_are_nats_and_a_banned_token_adds_nothing():
    p = torch.tensor([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert entropies(p.log()).tolist() == pytest.approx([1.0397207708399179, 0.0])


def test_hierarchical_takes_the_best_of_each_run_and_all_that_are_surer():
    masked = [True, True, False, True, True, False, True]
    section = {"name": "hierarchical", "low": 0.4}
    # runs 0-1, 3-4, 6
    assert filled(section, [0.5, 0.6, 0, 0.45, 0.41, 0, 0.3], masked) == [1, 3]
    assert filled(section, [0.75, 0.6, 0, 0.8, 0.9, 0, 0.3], masked) == [0, 3, 4]
    assert filled(section, [0.1, 0.2, 0, 0.35, 0.4, 0, 0.3], masked) == [4], "none above .4: the best one alone"
    assert filled(section, [0.5, 0.5, 0, 0.5, 0.5, 0, 0.5], masked) == [0, 3, 6], "of equal ones the lowest"


def test_card_gate_of_CV_14_and_CV_15():
    c = [0.3, 0.9, 0.2, 0.8]
    assert filled({"name": "card"}, c, tau_mask=1.0) == [0] and filled(
        {"name": "card", "order": "confident"}, c, tau_mask=1.0
    ) == [1]
    assert filled({"name": "card"}, c) == [1, 3] and filled({"name": "card"}, c, tau_mask=0.0) == [0, 1, 2, 3]
    assert filled({"name": "card", "most": 1}, c) == [1] and filled({"name": "card", "most": 3}, c, tau_mask=0.0) == [
        0,
        1,
        3,
    ]
    run = {"name": "card", "run": True}
    assert filled(run, c) == [0], "the first mask does not pass: one from the left"
    assert filled(run, [0.8, 0.9, 0.2, 0.8]) == [0, 1] and filled({**run, "most": 1}, [0.8, 0.9, 0.2, 0.8]) == [0]
    assert filled(run, [0.8, 0.9, 0.0, 0.8], [True, True, False, True]) == [0, 1, 3], "a written token is no gap"


def test_klass_waits_until_a_distribution_stands_still():
    """At 0.9 in all steps: the first has no move, the second and the third one of 0 each."""
    decoder = ThresholdEdit(tau_edit=None, reveal={"name": "klass", "history": 2})
    logits, state = logits_of([0.9, 0.9, 0.9]), canvas([[True] * 3])
    writes = []
    for _ in range(3):
        edit = decoder.edit(logits, state.masked, state)
        writes.append(edit.write[0].tolist())
        state = replace(state, memory=edit.memory)  # nothing written: the same canvas again
    assert writes == [[True, False, False], [True, False, False], [True, True, True]]
    moved = logits_of([0.9, 0.8, 0.9])  # KL(0.8 || 0.9) = 0.8 ln(8/9) + 0.2 ln 2 = 0.0444
    assert decoder.edit(moved, state.masked, state).write[0].tolist() == [True, False, True]
    looser = ThresholdEdit(tau_edit=None, reveal={"name": "klass", "history": 2, "epsilon": 0.0445})
    assert looser.edit(moved, state.masked, state).write[0].all()
    tighter = ThresholdEdit(tau_edit=None, reveal={"name": "klass", "history": 2, "epsilon": 0.0443})
    assert tighter.edit(moved, state.masked, state).write[0].tolist() == [True, False, True]


def test_klass_forgets_a_position_that_was_written_in_between():
    decoder = ThresholdEdit(tau_edit=None, tau_mask=0.5, reveal={"name": "klass", "history": 1})
    first = canvas([[True, True, True]])
    memory = decoder.edit(logits_of([0.9, 0.9, 0.9]), first.masked, first).memory
    second = canvas([[True, False, True]], memory)
    memory = decoder.edit(logits_of([0.9, 0.9]), second.masked, second).memory
    third = canvas([[True, True, True]], memory)  # the middle one was made a mask again
    assert decoder.edit(logits_of([0.9, 0.9, 0.9]), third.masked, third).write[0].tolist() == [True, False, True]


def test_credit_raises_what_stays_the_likeliest():
    """By hand: p 0.5, alpha 2, gamma 1, beta 0.5: credit 0.5, 0.75, 0.875 after three steps."""
    rule = {"name": "credit", "alpha": 2.0, "beta": 0.5, "gamma": 1.0}
    decoder = ThresholdEdit(tau_edit=None, tau_mask=0.65, reveal=rule)
    state, logits = canvas([[True, True]]), logits_of([0.5, 0.4])
    for credit in (0.5, 0.75, 0.875):
        edit = decoder.edit(logits, state.masked, state)
        # the second: 0.4 (1 + c)^2 / (0.4 (1 + c)^2 + 0.6) is .566, .631 and .658 for c of 0.4, 0.6 and 0.7
        assert edit.write[0].tolist() == [True, credit == 0.875]
        ids, kept = edit.memory[0]
        assert ids[0, 0] == 2 and float(kept[0].sum()) == pytest.approx(credit)
        assert edit.confidence[0].tolist() == pytest.approx([0.5, 0.4]), "told is the model's own"
        state = replace(state, memory=edit.memory)


def test_credit_keeps_its_richest_entries_and_drops_those_of_a_written_position():
    rule = REVEALS["credit"](alpha=1.0, beta=0.5, gamma=1.0, entries=1)
    state = canvas([[True]])
    _, memory = rule.shift(logits_of([0.9], token=2), state, ())
    raised, memory = rule.shift(logits_of([0.6], token=3), state, memory)
    assert memory[0][0].tolist() == [[3]] and memory[0][1].tolist() == [[pytest.approx(0.6)]]
    assert float((raised - logits_of([0.6], token=3))[0, 3]) == pytest.approx(torch.tensor(1.6).log().item(), abs=1e-6)
    _, memory = rule.shift(logits_of([]), canvas([[False]]), memory)
    assert memory[0][0].tolist() == [[-1]] and memory[0][1].tolist() == [[0.0]]
    rule, memory = REVEALS["credit"](beta=0.5, gamma=1.0, entries=2), ()
    for p, token in ((0.9, 2), (0.6, 3), (0.5, 4)):  # before the third 2 has .225 and 3 has .3
        _, memory = rule.shift(logits_of([p], token=token), state, memory)
    assert memory[0][0].tolist() == [[4, 3]] and memory[0][1].tolist() == [[pytest.approx(0.5), pytest.approx(0.3)]]


@pytest.mark.parametrize(
    "rule", [case for case in CASES if case["name"] not in ("klass", "credit", "factor", "entropy_bound")]
)
def test_a_lower_threshold_fills_no_less(rule):
    """CV-16, where something passes: by the same logits."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        c = (torch.rand(6, generator=generator) * 0.8 + 0.1).tolist()
        rule = {key: value for key, value in rule.items() if key != "most"}
        high, low = filled(rule, c, tau_mask=0.6), filled(rule, c, tau_mask=0.4)
        assert set(high) <= set(low) or max(c) <= 0.6


def test_the_fallback_fills_one_mask():
    c = [0.3, 0.5, 0.4]
    assert [filled("threshold", c, fallback=which) for which in ("confident", "left", "entropy")] == [[1], [0], [1]]
    assert filled("threshold", [0.0, 0.3, 0.4], [False, True, True], fallback="left") == [1]
    # equal confidence in the first, less entropy in the second: its rest is on one token
    logits, state = logits_of([0.5, 0.5]), canvas([[True, True]])
    logits[1, 3:MASK] = -50.0
    logits[1, 0] = logits[1, 1] = -1.4
    edit = ThresholdEdit(tau_edit=None, fallback="entropy").edit(logits, state.masked, state)
    assert edit.write[0].tolist() == [False, True]


NEUTRAL = [
    {"reveal": "threshold"},
    {"reveal": {"name": "klass", "epsilon": float("inf")}},
    {"reveal": {"name": "credit", "alpha": 0.0}},
    {"reveal": {"name": "hierarchical", "low": 1.0}},
    {"reveal": {"name": "card", "order": "confident"}},
]


@pytest.mark.parametrize("tau_edit", [None, 0.3])
@pytest.mark.parametrize("neutral", NEUTRAL, ids=lambda knobs: str(knobs["reveal"]))
def test_every_rule_has_a_setting_that_is_the_threshold(neutral, tau_edit):
    """CV-14, CV-33: token for token and forward for forward, alone and in one batch."""
    for seed in range(3):
        model = random_model("qwen3", "block", 4, seed=seed)
        for tau in (0.2, 0.5):
            with under_profile("FULL"):
                plain, rule = (ThresholdEdit(tau_mask=tau, tau_edit=tau_edit, **knobs) for knobs in ({}, neutral))
            settings = GenerationConfig(max_new_tokens=12, debug=True, trace=True)
            for one, other in zip(
                *(generate(model, None, PROMPTS, each, settings) for each in (plain, rule)), strict=True
            ):
                assert one.tokens == other.tokens and one.stats.denoise_forwards == other.stats.denoise_forwards


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_rows_do_not_depend_on_company_nor_on_the_cache(case, temperature):
    for alignment in ("block", "parent"):
        model = random_model("llama", alignment, 4, seed=3)
        with under_profile("FULL"):
            decoder = ThresholdEdit(tau_mask=0.2, tau_edit=0.15, reveal=case, temperature=temperature)
        settings = GenerationConfig(max_new_tokens=10, debug=True)
        together = generate(model, None, PROMPTS, decoder, settings)
        for number, prompt in enumerate(PROMPTS):
            for other in (settings, replace(settings, cached=False)):
                (alone,) = generate(model, None, [prompt], decoder, other, seeds=[number])
                assert alone.tokens == together[number].tokens
                assert alone.stats.denoise_forwards == together[number].stats.denoise_forwards


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_every_rule_ends_and_writes_every_place_once(case):
    model = random_model("llama", "block", 4, seed=5)
    with under_profile("FULL"):
        decoder = ThresholdEdit(tau_mask=0.3, tau_edit=None, max_post=0, reveal=case)
    (done,) = generate(model, None, [[5, 6]], decoder, GenerationConfig(max_new_tokens=14, trace=True))
    drafts = [at for step in done.trace for at, *_ in step.drafts]
    assert sorted(drafts) == list(range(2, 16)) and done.stats.denoise_forwards <= 14


class Remembering(Decoder):
    """Counts the steps of each row's block in its memory, and fills one mask at a time."""

    def __init__(self, name: str = "") -> None:
        self.name, self.seen = name, []

    def edit(self, logits, where, canvas):
        counts = [0 if memory is None else memory for memory in (canvas.memory or (None,) * len(canvas.tokens))]
        self.seen.append(counts)
        first = fill_above(torch.zeros(canvas.masked.shape), canvas.masked, 1.0)
        tokens = torch.ones_like(canvas.tokens)
        final = ~canvas.left(first, tokens).any(-1)
        memory = tuple(count + 1 for count in counts)
        return Edit(first, tokens, torch.zeros(where.shape, dtype=torch.float64), final, memory=memory)


def test_a_memory_is_of_one_row_and_one_block():
    decoder = Remembering()
    generate(
        ScriptedModel(lambda *_: [(1, 0.5)] * 4), None, [[7, 8, 9], [7]], decoder, GenerationConfig(max_new_tokens=5)
    )
    # row 0 has 1 place left in its first block and 4 in the next; row 1 has 3 and then 2
    assert decoder.seen == [[0, 0], [0, 1], [1, 2], [2, 0], [3, 1]]


def test_a_memory_goes_to_its_own_decoder():
    one, other = Remembering("one"), Remembering("other")
    forgetful = ThresholdEdit(tau_edit=None)
    state = canvas([[True, True]] * 3, memory=(5, None, 7))
    edit = PerRow([one, forgetful, other]).edit(logits_of([0.5] * 6), state.masked, state)
    assert one.seen == [[5]] and other.seen == [[7]] and edit.memory == (6, None, 8)


def test_bad_sections_are_one_line():
    for section, says in (
        ({"name": "klass", "epsilon": -1.0}, "epsilon: -1.0"),
        ({"name": "entropy_bound", "gamma": float("nan")}, "gamma"),
        ({"name": "factor", "f": "much"}, "f: 'much'"),
        ({"name": "factor", "g": 1}, "unknown key 'g'"),
        ({"f": 1.0}, "decoder.reveal has no name"),
        ({"name": "card"}, "'card' is a FULL method"),
        ("card", "'card' is a FULL method"),
    ):
        with pytest.raises(ConfigError, match=says):
            make_decoder(decoder_section(reveal=section))
    with pytest.raises(UnknownChoice, match="did you mean 'factor'"):
        make_decoder(decoder_section(reveal="facter"))
    with under_profile("FULL") as research:
        make_decoder(decoder_section(reveal="card"))
    assert research == {"card"}


def test_equal_decoders_are_equal_keys():
    one, other = (ThresholdEdit(reveal={"name": "factor", "f": 1.0}) for _ in range(2))
    assert one == other and hash(one) == hash(other) and len({one, other, ThresholdEdit()}) == 2
    assert ThresholdEdit(reveal="credit").sampling is None and ThresholdEdit(reveal="factor").sampling is not None
