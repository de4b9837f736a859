"""What an evaluation says of how long it will take."""

import pytest

from decoding_stubs import ScriptedModel
from hildanext.ar import Parent
from hildanext.core.errors import ConfigError
from hildanext.eval import evaluation
from hildanext.eval.evaluation import EvalConfig
from small_models import small_causal


def test_the_time_of_the_likelihoods_is_told_once_the_parents_is_known(monkeypatch):
    clock = iter([0.0, 30.0])  # 30 s for the parent's forward of all rows, of which each draw costs two
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: next(clock))
    baseline = evaluation.TextLikelihood("exact", 1, 10, 20.0, 0.0)
    monkeypatch.setattr(evaluation, "parent_likelihood", lambda *_: baseline)
    monkeypatch.setattr(evaluation, "bound", lambda *_, **__: baseline)
    said = []
    settings = evaluation.LikelihoodConfig(block_sizes=(1, 4), draws=4)
    model = ScriptedModel(lambda tokens, start: [(3, 1.0)] * 4)
    evaluation._likelihoods(model, Parent(small_causal(), None), [], 0, settings, said.append)
    assert said[1] == "the model's likelihoods: 5 min left"


def test_rows_longer_than_any_context_are_refused():
    with pytest.raises((ConfigError, ValueError), match="sequence_length|1048576"):
        EvalConfig(model="tiny", data="x", sequence_length=2**63)
