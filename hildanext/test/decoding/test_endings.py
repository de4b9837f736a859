"""A block ends where its text does: behind a limit or a written end of text nothing is asked for or written."""

from dataclasses import replace

import pytest
import torch

from conftest import random_model
from decoding_stubs import MASK, ScriptedModel, StubTokenizer
from hildanext.decoding import S2D2, Ordered, ThresholdEdit
from hildanext.decoding.base import Ends
from hildanext.decoding.pruned import Pruned
from hildanext.engine.base import Request, complete
from hildanext.engine.local import LocalEngine, LocalEngineConfig
from hildanext.inference import GenerationConfig, generate

A, B, C, D, EOS = 1, 2, 3, 4, 10
ONE = ThresholdEdit(tau_mask=1.0, tau_edit=None, max_post=0)


def done(script, decoder, new, block=8, prompt=(7,) * 8, eos=EOS, **settings):
    tokenizer = StubTokenizer(eos=eos) if eos is not None else None
    settings = GenerationConfig(max_new_tokens=new, trace=True, **settings)
    return generate(ScriptedModel(script, block_size=block), tokenizer, [list(prompt)], decoder, settings)[0]


def rising(tokens, position):
    """Surer from left to right, the end of text in the fourth place."""
    return [(token, 0.9 - 0.05 * at) for at, token in enumerate([A, B, C, EOS, D, D, D, D][: len(tokens)])]


@pytest.mark.parametrize("decoder", [ONE, Ordered(order="left_to_right"), Ordered(order="confidence")])
def test_one_token_a_step_takes_no_more_forwards_than_tokens_kept(decoder):
    answer = done(rising, decoder, 32)
    assert answer.tokens == [A, B, C, EOS] and answer.finish_reason == "eos" and answer.stats.denoise_forwards == 4
    assert [step.masks for step in answer.trace] == [list(range(8 + at, 16)) for at in range(4)]
    assert answer.trace[-1].final and sum(len(step.drafts) for step in answer.trace) == 4


def test_one_forward_a_token_up_to_the_limit():
    answer = done(rising, ONE, 11, eos=None)
    assert answer.tokens == [A, B, C, EOS, D, D, D, D, A, B, C] and answer.stats.denoise_forwards == 11
    assert max(place for step in answer.trace for place in step.masks) == 18


def test_an_end_of_text_with_a_mask_before_it_closes_nothing():
    def script(tokens, position):
        return [(A, 0.5), (EOS, 0.9), (C, 0.8), (D, 0.7)]

    answer = done(script, ONE, 4, block=4, prompt=(7,) * 4)
    assert answer.tokens == [A, EOS] and answer.stats.denoise_forwards == 4, "the first place is the least sure one"
    assert [len(step.masks) for step in answer.trace] == [4, 3, 2, 1]


def test_an_edit_that_takes_the_end_away_opens_what_stood_behind():
    def script(tokens, position):
        if tokens[0] == MASK:
            return [(EOS, 0.9), (B, 0.1), (C, 0.1), (D, 0.1)]
        return [(A, 0.9), (B, 0.9), (C, 0.9), (D, 0.9)]

    answer = done(script, ThresholdEdit(tau_mask=0.5, tau_edit=0.5), 4, block=4, prompt=(7,) * 4)
    assert answer.tokens == [A, B, C, D] and answer.finish_reason == "length"
    assert [step.masks for step in answer.trace] == [[4, 5, 6, 7], [], [5, 6, 7], []]
    assert answer.trace[1].edits == [(4, EOS, A, pytest.approx(0.9))]


def test_a_last_edit_that_takes_the_end_away_does_not_end_the_block():
    """With no forward left once filled: the edit opens masks, so that the block is not filled."""

    def script(tokens, position):
        if tokens[0] == MASK:
            return [(EOS, 0.9), (B, 0.1), (C, 0.1), (D, 0.1)]
        return [(A, 0.9), (B, 0.9), (C, 0.9), (D, 0.9)]

    answer = done(script, ThresholdEdit(tau_mask=0.5, tau_edit=0.5, max_post=1), 4, block=4, prompt=(7,) * 4)
    assert answer.tokens == [A, B, C, D]


def test_the_prompt_s_end_of_text_ends_nothing():
    prompt = [7, 7, EOS, 7, EOS, 7]
    answer = done(lambda tokens, position: [(A, 0.9)] * 8, ONE, 10, prompt=prompt)
    assert answer.tokens == [A] * 10 and answer.stats.denoise_forwards == 10


def test_whoever_goes_on_behind_an_end_of_text_writes_it_all():
    answer = done(rising, ONE, 8, ignore_eos=True)
    assert answer.tokens == [A, B, C, EOS, D, D, D, D] and answer.stats.denoise_forwards == 8


def test_blocks_that_may_still_change_are_written_whole():
    answer = done(rising, ThresholdEdit(tau_mask=1.0, window=1), 16)
    assert answer.tokens == [A, B, C, EOS]
    assert {at for step in answer.trace for at, *_ in step.drafts} >= set(range(8, 16))


def test_positions_behind_an_end():
    tokens = torch.tensor([[A, EOS, B, EOS, C], [EOS, A, EOS, B, C], [A, B, C, D, EOS], [A, EOS, B, B, B]])
    unwritten = torch.tensor([[0, 0, 1, 0, 1], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    own = torch.ones_like(unwritten)
    own[1, 0] = False
    ends = Ends(torch.tensor([EOS]), own)
    assert ends.behind(tokens, unwritten).int().tolist() == [[0, 0, 1, 1, 1], [0] * 5, [0] * 5, [0] * 5]
    assert ends.stand_in(tokens).tolist() == [True, True, True, True]


DECODERS = [
    ThresholdEdit(tau_mask=0.3, tau_edit=0.2),
    ThresholdEdit(tau_mask=0.3, tau_edit=None, temperature=0.9),
    ThresholdEdit(tau_mask=0.3, tau_edit=0.1, reveal="klass", fallback="left"),
    Ordered(per_step=2),
    Pruned(per_step=1),
    S2D2(),
]


@pytest.mark.parametrize("decoder", DECODERS, ids=lambda decoder: type(decoder).__name__)
def test_cached_uncached_together_and_in_the_engine_alike(decoder):
    """A model whose every second token ends a text, so that rows end inside blocks at all places."""
    ended = 0
    for alignment in ("block", "parent"):
        model = random_model("llama", alignment, 8, seed=2)
        head = model.causal_lm.get_output_embeddings().weight
        with torch.no_grad():
            head[EOS] += 0.35 * head.std() * torch.sign(head.mean(0))
        tokenizer = StubTokenizer(eos=EOS)
        prompts, settings = (
            [[5], [6, 7, 8], [9, 11, 12, 13, 14], [15, 16]],
            GenerationConfig(max_new_tokens=18, debug=True),
        )
        together = generate(model, tokenizer, prompts, decoder, settings)
        uncached = generate(model, tokenizer, prompts, decoder, replace(settings, cached=False))
        for number, prompt in enumerate(prompts):
            (alone,) = generate(model, tokenizer, [prompt], decoder, settings, seeds=[number])
            same = {
                (tuple(each.tokens), each.stats.denoise_forwards)
                for each in (alone, together[number], uncached[number])
            }
            assert len(same) == 1
        ended += sum(each.finish_reason == "eos" for each in together)
    assert ended or isinstance(decoder, Pruned)


def test_the_engine_asks_for_no_more_than_it_keeps():
    engine = LocalEngineConfig(threads=1).open("tiny", None, "for a test")
    assert isinstance(engine, LocalEngine)
    try:
        for new in (3, 11, 20):
            section = {"name": "threshold_edit", "tau_mask": 1.0, "tau_edit": None, "max_post": 0}
            answer = complete(engine, Request(prompt="Once upon a time", decoder=section, max_new_tokens=new))
            assert 0 < answer.stats.denoise_forwards <= len(answer.tokens)
    finally:
        engine.close(0.0)
