"""Weights that change under an engine: nothing of the old ones is left, and answers say which wrote them."""

import pytest
import torch

from conftest import random_model
from decoding_stubs import StubTokenizer
from hildanext.ar import Parent
from hildanext.core.errors import ConfigError
from hildanext.decoding import decoder_section
from hildanext.engine.base import EngineBusy, Failed, Finished, Request, complete
from hildanext.engine.local import LocalEngine, LocalEngineConfig
from hildanext.models.attention.dense import MaskedAttention
from hildanext.models.packed_linear import PackedLinear

PROMPT = tuple(range(1, 19))
ASKED = [
    Request(tokens=PROMPT, decoder={"name": "ordered", "temperature": 1.0}, max_new_tokens=12, trajectory=True),
    Request(tokens=PROMPT, decoder=decoder_section("S_MODE", tau_mask=0.3), max_new_tokens=12, seed=3),
    Request(tokens=PROMPT, decoder=decoder_section("exact", drafter="ngram"), max_new_tokens=12),
    Request(tokens=PROMPT, max_new_tokens=4, scores=True),
]


def engine_of(model) -> LocalEngine:
    parent = Parent(model.causal_lm, StubTokenizer(bos=0), banned=model.banned)
    return LocalEngine(model, StubTokenizer(bos=0), parent, LocalEngineConfig(slots=2))


def learn(model, steps: int = 2) -> float:
    """A few steps of an optimiser on the same model, of this thread, as a policy's update would take them."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.05)
    tokens = torch.tensor([list(PROMPT)])
    seen = torch.ones(1, len(PROMPT), len(PROMPT), dtype=torch.bool)
    for _ in range(steps):
        hidden = model.hidden(tokens, torch.arange(len(PROMPT))[None], MaskedAttention(seen))
        loss = torch.nn.functional.cross_entropy(model.logits(hidden[0]), torch.full((len(PROMPT),), 7))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return float(loss.detach())


@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_answers_are_those_of_a_new_engine_and_say_which_weights_wrote_them(alignment):
    model = random_model("llama", alignment, 4, seed=5)
    asked = ASKED if alignment == "parent" else ASKED[:3]
    engine = engine_of(model)
    before = [complete(engine, one) for one in asked]
    again = complete(engine, asked[0])
    assert again.cached_tokens == 16 and [one.weights for one in before] == [0] * len(asked)
    assert learn(model) > 0, "what the engine left behind does not stand in autograd's way"
    assert engine.weights_changed() == 1
    assert engine.load().cache_bytes == 0
    other = engine_of(model)
    for one, old in zip(asked, before, strict=True):
        new, fresh = complete(engine, one), complete(other, one)
        assert new.cached_tokens == fresh.cached_tokens
        assert (new.tokens, new.scores, new.weights, fresh.weights) == (fresh.tokens, fresh.scores, 1, 0)
        assert new.tokens != old.tokens, "the weights have changed a lot"
    assert engine.weights_changed() == 2
    engine.close()
    other.close()


def test_weights_do_not_change_while_requests_run():
    model = random_model("llama", "block", 4)
    engine = engine_of(model)
    heard = []
    tickets = [
        engine.submit(Request(tokens=(1, number), max_new_tokens=400, ignore_eos=True), heard.append)
        for number in range(3)
    ]
    with pytest.raises(EngineBusy, match="while 3 requests run or wait"):
        engine.weights_changed()
    for ticket in tickets:
        ticket.cancel()
    while sum(isinstance(event, Finished | Failed) for event in list(heard)) < 3:
        pass
    assert engine.weights_changed() == 1, "a refusal is no version"
    engine.close()


def test_copies_of_weights_cannot_change(monkeypatch):
    """What is packed for bf16 kernels, or exported, would go on as it was."""
    model = random_model("llama", "block", 4)
    engine = engine_of(model)
    stand_in = PackedLinear.__new__(PackedLinear)
    torch.nn.Module.__init__(stand_in)
    monkeypatch.setattr(model.causal_lm, "modules", lambda: iter([stand_in]))
    with pytest.raises(ConfigError, match=r"copies of the weights \(packed\)"):
        engine.weights_changed()
    assert complete(engine, Request(tokens=(5, 6), max_new_tokens=3)).weights == 0
    engine.close()
