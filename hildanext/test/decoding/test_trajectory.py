"""What is recorded of a text: every action once, with the log-probability that the state before it gave it."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from test_decoding import EOS, PROMPT, A, B, C, D, X, toy_a

import hildanext.decoding.base as decoding_base
from conftest import random_model
from decoding_stubs import MASK, ScriptedModel, StubTokenizer
from hildanext.core.errors import ConfigError
from hildanext.decoding import S2D2, ExactConfig, ThresholdEdit, decoder_section, make_decoder
from hildanext.decoding.state import DecodeState
from hildanext.decoding.trajectory import Trajectory, check_recordable
from hildanext.engine.base import Finished, Request, complete
from hildanext.engine.local import LocalEngine, LocalEngineConfig
from hildanext.inference import GenerationConfig, generate

SAMPLED = ThresholdEdit(tau_mask=0.3, tau_edit=0.05, max_post=3, temperature=1.3, top_k=30, top_p=0.95)
PROMPTS = [[3, 4, 5, 6, 7, 8], [9, 10], [11, 12, 13, 14], [15] * 9]


def recorded(model, decoder, prompts, new=14, tokenizer=None, **settings):
    settings = GenerationConfig(max_new_tokens=new, seed=7, trace=True, **settings)
    return generate(model, tokenizer, prompts, decoder, settings, trajectories=True)


def arrays(trajectory: Trajectory):
    return [np.asarray(getattr(trajectory, field.name)).tolist() for field in fields(trajectory)]


def states(trajectory: Trajectory, mask: int, size: int):
    """Before each step of each block: where it starts, its step, and the document up to its end."""
    for start in range(trajectory.prompt // size * size, len(trajectory.tokens), size):
        span = slice(start, start + size)
        inside = (trajectory.edits[:, 1] >= start) & (trajectory.edits[:, 1] < start + size)
        edits = trajectory.edits[inside]
        for step in range(max(trajectory.step[span].max(), *edits[:, 0], 0) + 1):
            tokens = trajectory.filled[: start + size].copy()
            tokens[:start] = trajectory.tokens[:start]
            for when, position, _, new in edits:
                tokens[position] = new if when < step else tokens[position]
            tokens[span][trajectory.step[span] >= step] = mask
            yield start, step, tokens


@torch.no_grad()
def chances(model, start, tokens):
    """Log of the law at every position of the last block, by hand: temperature 1.3, top-k 30, top-p 0.95."""
    state = DecodeState(model, [tokens.tolist()], [len(tokens)], lambda row, text: False, cached=False)
    state.rows[0].start, state.rows[0].prompt = start, start
    canvas = state.canvas()
    laws = []
    for row in state.logits(canvas.every):
        order = sorted(range(len(row)), key=lambda token: -float(row[token]))[:30]
        p = (row[order] / 1.3).softmax(-1)
        kept = int((p.cumsum(-1) - p < 0.95).sum())
        law = torch.zeros_like(row)
        law[order[:kept]] = p[:kept] / p[:kept].sum()
        laws.append(law.log())
    return laws


@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_every_action_has_the_log_probability_that_its_state_gives_it(alignment):
    """Replayed from the arrays alone, without a cache, by another spelling of the law."""
    model = random_model("llama", alignment, 4, seed=1)
    edits = 0
    for answer in recorded(model, SAMPLED, PROMPTS):
        kept = answer.trajectory
        told = {(step, position): at for at, (step, position, *_) in enumerate(kept.edits.tolist())}
        seen = np.full(len(kept.tokens), -1)
        for start, step, tokens in states(kept, model.card.mask_id, 4):
            for place, law in enumerate(chances(model, start, tokens)):
                at = start + place
                if kept.step[at] == step:
                    seen[at] = step
                    assert tokens[at] == model.card.mask_id
                    assert kept.logp[at] == pytest.approx(float(law[kept.filled[at]]), abs=1e-9)
                    assert kept.entropy[at] == pytest.approx(float(torch.special.entr(law.exp()).sum()), abs=1e-9)
                if (step, at) in told:
                    number = told[step, at]
                    edits += 1
                    assert tokens[at] == kept.edits[number, 2]
                    assert kept.edit_logp[number] == pytest.approx(float(law[kept.edits[number, 3]]), abs=1e-9)
        end = kept.prompt + len(answer.tokens)
        assert (
            (seen == kept.step).all()
            and (kept.step[: kept.prompt] == -1).all()
            and (seen[kept.prompt : end] >= 0).all()
        )
        assert (kept.logp[kept.prompt : end] < 0).all() and not kept.logp[: kept.prompt].any()
        assert (kept.step[end:] == -1).all() and (kept.tokens[end:] == model.card.mask_id).all()
    assert edits > 3, "edits were recorded, too"


def test_steps_are_counted_in_their_block_and_edits_tell_both_tokens():
    """Toy A: axc_ in the first step, then d and the edit of x to b; greedy tokens have a log-probability of 0."""
    kept = recorded(ScriptedModel(toy_a), ThresholdEdit(tau_mask=0.5, tau_edit=0.0), [PROMPT], 8)[0].trajectory
    assert kept.step.tolist() == [-1] * 4 + [0, 0, 0, 1] * 2 and kept.prompt == 4
    assert kept.edits.tolist() == [[1, 5, X, B], [1, 9, X, B]] and kept.edit_logp.tolist() == [0.0, 0.0]
    assert kept.tokens.tolist() == [*PROMPT, A, B, C, D, A, B, C, D]
    assert kept.filled.tolist() == [*PROMPT, A, X, C, D, A, X, C, D]
    assert not kept.logp.any() and not kept.entropy.any() and kept.biased


def test_the_terminal_block_is_kept_whole():
    """What was written behind the end of text was an action as well; the masks that stayed there are told, too."""
    model = ScriptedModel(lambda *_: [(A, 0.9), (EOS, 0.9), (C, 0.9), (D, 0.5)])
    answer = recorded(model, ThresholdEdit(), [PROMPT], 12, StubTokenizer(eos=EOS))[0]
    assert answer.tokens == [A, EOS] and answer.trajectory.tokens.tolist() == [*PROMPT, A, EOS, C, MASK]
    assert answer.trajectory.step.tolist() == [-1] * 4 + [0, 0, 0, -1]
    answer = recorded(model, ThresholdEdit(), [PROMPT], 5)[0]
    assert answer.tokens == [A, EOS, C, D, A] and answer.trajectory.tokens.tolist()[8:] == [A, MASK, MASK, MASK]


def test_off_costs_nothing_and_on_changes_no_answer(monkeypatch):
    model = random_model("llama", "block", 4, seed=2)
    watched = recorded(model, SAMPLED, PROMPTS)

    def never(*_):
        raise AssertionError("nobody asked for a law")

    monkeypatch.setattr(decoding_base, "law", never)
    settings = GenerationConfig(max_new_tokens=14, seed=7, trace=True)
    for off, on in zip(generate(model, None, PROMPTS, SAMPLED, settings), watched, strict=True):
        assert off.trajectory is None and on.trajectory is not None
        assert (off.tokens, off.trace, off.finish_reason) == (on.tokens, on.trace, on.finish_reason)
        assert off.to_record().keys() == on.to_record().keys()


WAYS = [
    decoder_section("S_MODE", tau_mask=0.3, temperature=1.3, top_k=30),
    decoder_section("Q_MODE", tau_mask=0.5, tau_edit=0.05, max_post=3, temperature=0.8),
    decoder_section("S_MODE", tau_mask=0.3, tau_edit=0.1, window=1),
    {"name": "ordered", "per_step": 2, "temperature": 0.9},
]


@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_an_engine_records_what_is_recorded_alone(alignment):
    """Beside requests that are not recorded, of other decoders, through turns, rests and shared prefixes."""
    model = random_model("llama", alignment, 4, seed=3)
    engine = LocalEngine(model, StubTokenizer(bos=0), None, LocalEngineConfig(slots=3, quantum=1, prefill_tokens=8))
    asked = []
    for number in range(10):
        prompt = (*range(1, 10 + number % 3), 20 + number)
        way, new = WAYS[number % 4], 9 + 2 * number
        asked.append(
            Request(tokens=prompt, decoder=way, max_new_tokens=new, seed=number, trajectory=number % 4 in (0, 1, 3))
        )
    answers, rests = {}, []
    park = engine.diffusion.pause
    engine.diffusion.pause = lambda request: (rests.append(request.id), park(request))
    tickets = [
        engine.submit(one, lambda event, at=at: answers.update({at: event}) if isinstance(event, Finished) else None)
        for at, one in enumerate(asked)
    ]
    engine.close(60.0)
    assert len(tickets) == len(answers) == 10 and len(rests) > 10, "some rested"
    for at, one in enumerate(asked):
        answer = answers[at].answer
        assert (answer.trajectory is not None) == one.trajectory
        settings = GenerationConfig(max_new_tokens=one.max_new_tokens, seed=one.seed, cached=False)
        decoder = make_decoder(dict(one.decoder))
        (alone,) = generate(model, StubTokenizer(bos=0), [one.tokens], decoder, settings, trajectories=one.trajectory)
        assert alone.tokens == answer.tokens
        if one.trajectory:
            for own, other in zip(arrays(answer.trajectory), arrays(alone.trajectory), strict=True):
                assert np.asarray(own) == pytest.approx(np.asarray(other), abs=1e-9)


def test_what_is_recorded_may_reach_autograd():
    kept = recorded(random_model("llama", "block", 4), SAMPLED, [[5, 6]])[0].trajectory
    for field in fields(kept):
        if isinstance(value := getattr(kept, field.name), np.ndarray):
            assert not torch.from_numpy(value).is_inference(), field.name


@pytest.mark.parametrize(
    ("decoder", "says"),
    [
        (S2D2(), "S2D2 has no trajectory: no single distribution"),
        (ThresholdEdit(window=2), "ThresholdEdit with window 2 has no trajectory"),
        (ExactConfig(), "no diffusion model writes"),
        (None, "no diffusion model writes"),
    ],
)
def test_a_text_without_a_trajectory_is_refused_by_name(decoder, says):
    with pytest.raises(ConfigError, match=says):
        check_recordable(decoder)


def test_every_door_refuses_before_any_work():
    model = random_model("llama", "parent", 4)
    with pytest.raises(ConfigError, match="window 1"):
        generate(model, None, [[5]], ThresholdEdit(window=1), trajectories=True)
    engine = LocalEngine(model, StubTokenizer(bos=0))
    for wrong in ({"scores": True}, {"decoder": WAYS[2]}):
        with pytest.raises(ConfigError, match="trajectory"):
            engine.submit(Request(tokens=(5, 6), trajectory=True, **wrong), lambda event: None)
    assert complete(engine, Request(tokens=(5, 6), max_new_tokens=3, trajectory=True)).trajectory.prompt == 2
    engine.close()
