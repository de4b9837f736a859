"""Drafts of a block, confirmed at block size 1: the text is that mode's, and a run that is not verified is not."""

from dataclasses import replace

import pytest
import torch

from hildanext.ar import Parent
from hildanext.core.errors import ConfigError
from hildanext.core.registry import under_profile
from hildanext.decoding import S2D2, Canvas, ThresholdEdit, make_decoder
from hildanext.decoding.base import step
from hildanext.decoding.block_size_one import block_size_one_logits
from hildanext.decoding.per_row import PerRow
from hildanext.decoding.s2d2 import first_run
from hildanext.decoding.state import DecodeState
from hildanext.inference import GenerationConfig, generate
from hildanext.masks import TokenRows, may_attend
from hildanext.models import DiffusionModel
from hildanext.models.attention.dense import MaskedAttention

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14], [15, 16, 17, 18]]
NEW = 14
SAMPLED = {"temperature": 1.3, "top_p": 0.9}


def texts(model, decoder, prompts=PROMPTS, new=NEW, **settings):
    results = generate(model, None, prompts, decoder, GenerationConfig(max_new_tokens=new, seed=3, **settings))
    return [result.tokens for result in results]


def at_block_size_one(model):
    return DiffusionModel(model.causal_lm, replace(model.card, block_size=1)).eval()


@pytest.mark.parametrize("settings", [{}, {"batch_size": 1}, {"cached": False}, {"commit": "separate"}], ids=str)
@pytest.mark.parametrize("knobs", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_under_parent_alignment_the_text_is_the_autoregressive_one(make_model, knobs, settings):
    model = make_model("llama", "parent", seed=4)
    wanted = texts(at_block_size_one(model), ThresholdEdit(tau_mask=0.0, tau_edit=None, max_post=0, **knobs))
    assert texts(model, S2D2(**knobs), **settings) == wanted
    if not knobs:
        parent = Parent(model.causal_lm, None, model.banned)
        assert wanted == [parent.generate(prompt, NEW).tokens for prompt in PROMPTS]


@pytest.mark.parametrize("knobs", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_under_block_alignment_the_first_block_is_the_one_of_block_size_one(make_model, knobs):
    model = make_model("qwen3", "block", block_size=8)
    prompt, new = [5, 6, 7], 5
    one = ThresholdEdit(tau_mask=0.0, tau_edit=None, max_post=0, **knobs)
    for seed in range(8):
        of_one = generate(
            at_block_size_one(model), None, [prompt], one, GenerationConfig(max_new_tokens=new, seed=seed)
        )
        mine = generate(model, None, [prompt], S2D2(**knobs), GenerationConfig(max_new_tokens=new, seed=seed))
        assert mine[0].tokens == of_one[0].tokens


def test_the_mode_s_numbers_are_those_of_a_dense_mask(make_model):
    """Clean blocks of their own size before it, then clean tokens one by one with a mask behind each."""
    model = make_model("llama", "block")
    state = DecodeState(model, [[5, 6, 7, 8, 9]], [12], lambda row, tokens: False)
    state.prefill()
    canvas = state.canvas()
    state.logits(canvas.masked)
    tokens = torch.tensor([[9, 20, 21, 22]])
    where = torch.tensor([[False, True, True, True]])
    fed = torch.tensor([[5, 6, 7, 8, 9, 20, 21, *[model.card.mask_id] * 3]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 5, 6, 7]])
    noisy = torch.tensor([[False] * 7 + [True] * 3])
    rows = TokenRows(torch.zeros_like(fed), positions, noisy)
    prefix = (positions < 4)[0]
    mask = may_attend(rows, rows, 1, "token_causal") | (prefix[:, None] & prefix[None])
    dense = model.logits(model(model.embed(fed), positions, MaskedAttention(mask))[0, 7:])
    got = block_size_one_logits(model, state.rows, tokens, where)
    finite = dense.isfinite()
    assert torch.equal(finite, got.isfinite()) and torch.allclose(got[finite], dense[finite], atol=1e-12)
    first = block_size_one_logits(model, state.rows, tokens, torch.tensor([[True, False, False, False]]))
    assert first.shape[0] == 1 and first.isfinite().any(), "the block's first position has its boundary alone"


def test_a_run_that_is_never_verified_is_the_threshold_decoder_s(make_model):
    model = make_model("llama", "parent", seed=1)
    never = S2D2(tau_mask=0.4, min_span=100)
    assert texts(model, never) == texts(model, ThresholdEdit(tau_mask=0.4, tau_edit=None, max_post=0))


def test_drafts_that_the_mode_would_write_all_stay(make_model):
    """q = p: the mode's own text as a draft is accepted whole, in one step."""
    model = make_model("llama", "parent", seed=2)
    state = DecodeState(model, [PROMPTS[0]], [12], lambda row, tokens: False)
    state.prefill()
    canvas = state.canvas()
    wanted = Parent(model.causal_lm, None, model.banned).generate(PROMPTS[0], 2).tokens
    decoder = S2D2()
    edit = decoder.edit(state.logits(canvas.masked), canvas.masked, canvas)
    right = torch.cat([canvas.tokens[:, :2], torch.tensor([wanted])], 1)
    done = decoder.verify(replace(edit, tokens=right), canvas, state.causal_logits)
    assert done.write.tolist() == [[False, False, True, True]] and bool(done.final)
    wrong = torch.where(canvas.masked, (right + 1) % 60, right)
    done = decoder.verify(replace(edit, tokens=wrong), canvas, state.causal_logits)
    assert done.write.tolist() == [[False, False, True, False]] and int(done.tokens[0, 2]) == wanted[0]


def test_verifying_pays_by_what_is_expected_to_stay():
    """Drafts of .9, .5, .8: 0.9 + 0.45 + 0.36 = 1.71 expected; one is above 0.85."""
    masked = torch.tensor([[False, True, True, True]])
    canvas = Canvas(torch.zeros(1, 4, dtype=torch.long), masked, ~masked, torch.zeros(1, 4), torch.zeros(1).long())
    edit = ThresholdEdit(tau_mask=0.85, tau_edit=None).edit(torch.zeros(3, 8), masked, canvas)
    edit = replace(edit, confidence=torch.tensor([[0.0, 0.9, 0.5, 0.8]]))
    for cost, pays in ((1.7, True), (1.72, False)):
        assert bool(S2D2(cost=cost)._pays(edit, canvas, masked)) is pays
    assert not S2D2(min_span=4)._pays(edit, canvas, masked)


def test_a_run_ends_at_what_is_written():
    masked = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]).bool()
    assert first_run(masked).int().tolist() == [[0, 1, 1, 0, 0], [1] * 5, [0] * 5, [0, 0, 0, 0, 1]]


def test_rows_with_decoders_of_their_own_are_verified_as_if_alone(make_model):
    model = make_model("llama", "parent", seed=4)
    decoders = [S2D2(), ThresholdEdit(tau_mask=0.3), S2D2(min_span=2), S2D2()]
    wanted = [texts(model, decoder, [prompt])[0] for decoder, prompt in zip(decoders, PROMPTS, strict=True)]
    done: dict[int, list[int]] = {}

    def ended(row, tokens):
        done[row.index] = tokens[row.prompt : row.limit]
        return row.start >= row.limit

    limits = [len(prompt) + NEW for prompt in PROMPTS]
    state = DecodeState(model, PROMPTS, limits, ended)
    state.prefill()
    while (canvas := state.canvas()) is not None:
        step(PerRow([decoders[row.index] for row in state.rows]), state, canvas)
    assert [done[i] for i in range(len(PROMPTS))] == wanted


def test_verifying_is_a_forward_and_counts_as_one(make_model):
    model = make_model("llama", "parent")
    made: list[int] = []
    handle = model.causal_lm.model.register_forward_hook(lambda *_: made.append(1))
    done = generate(model, None, [PROMPTS[0]], S2D2(), GenerationConfig(max_new_tokens=6))[0]
    handle.remove()
    assert done.stats.forwards == len(made)


def test_it_is_a_research_method():
    with pytest.raises(ConfigError, match="'s2d2' is a FULL method"):
        make_decoder({"name": "s2d2"})
    with under_profile("FULL") as research:
        make_decoder({"name": "s2d2"})
    assert research == {"s2d2"}
