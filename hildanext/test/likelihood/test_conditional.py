"""Scoring a continuation: exact at block size 1, a bound with the right mean elsewhere, and only the continuation."""

import itertools

import pytest
import torch

from conftest import random_model
from hildanext.ar import Parent
from hildanext.core.errors import PromptError
from hildanext.likelihood.conditional import Pair, score_diffusion, score_parent

ALIGNMENTS = ["block", "parent"]
PAIRS = [
    Pair((0, 5, 9), (33, 21, 7, 40, 12)),
    Pair((0,), (8, 3)),
    Pair((0, 17, 22, 4, 31, 6, 50), (2,)),
    Pair((0, 5, 9, 33), (21,)),
]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_an_untrained_parent_aligned_model_is_its_parent_at_block_size_1(family):
    model = random_model(family, "parent", 4)
    parent = Parent(model.causal_lm, None, model.banned)
    for ours, theirs in zip(score_diffusion(model, PAIRS, 1), score_parent(parent, PAIRS), strict=True):
        assert ours.kind == theirs.kind == "exact" and ours.se == 0.0 and ours.tokens == theirs.tokens
        assert ours.nats == pytest.approx(theirs.nats, abs=1e-9)


def test_the_parent_s_number_is_its_own_cross_entropy():
    model = random_model("llama", "parent", 4)
    parent = Parent(model.causal_lm, None, model.banned)
    for pair, scored in zip(PAIRS, score_parent(parent, PAIRS), strict=True):
        tokens = torch.tensor([[*pair.context, *pair.continuation]])
        nll = parent.token_nll(tokens, torch.zeros_like(tokens), torch.arange(tokens.shape[1])[None])
        assert scored.nats == pytest.approx(float(nll[0, len(pair.context) :].sum()), abs=1e-9)


def mean_over_masks(model, pair: Pair) -> float:
    """The bound of a continuation inside one block by going through all its masks, each scored as if it were drawn."""
    count, total = len(pair.continuation), 0.0
    for k in range(1, count + 1):
        subsets = list(itertools.combinations(range(count), k))
        for subset in subsets:
            logits = first_step(model, pair, subset)
            losses = [-float(logits[i].log_softmax(-1)[pair.continuation[i]]) for i in subset]
            total += sum(losses) * count / k / len(subsets) / count
    return total


def first_step(model, pair: Pair, masked: tuple[int, ...]) -> torch.Tensor:
    """Logits for the continuation's positions when the decode loop sees the others written and nothing behind."""
    from hildanext.decoding.state import DecodeState

    known = [token for i, token in enumerate(pair.continuation) if i not in masked]
    session = DecodeState(model, [list(pair.context)], [len(pair.context) + 4], lambda row, tokens: False)
    session.prefill()
    canvas = session.canvas()
    first = len(pair.context)
    for i, token in enumerate(pair.continuation):
        if i not in masked:
            session.rows[0].tokens[first + i] = token
    canvas = session.canvas()
    assert int(canvas.masked.sum()) == session.block - first % session.block - len(known)
    where = torch.zeros_like(canvas.masked)
    inside = first % session.block
    where[0, inside : inside + len(pair.continuation)] = True
    return session.logits(where).detach()


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_the_bound_s_mean_is_the_average_over_all_masks_of_the_decode_loop_s_own_forward(alignment):
    model = random_model(alignment=alignment, block_size=4)
    pair = Pair((0, 5, 9, 33, 12), (21, 7, 40), seed=3)
    (score,) = score_diffusion(model, [pair], draws=400, batch_size=100)
    assert score.kind == "bound" and 0 < score.se < 0.2
    assert score.nats == pytest.approx(mean_over_masks(model, pair), abs=4 * score.se)


def test_the_error_is_that_of_each_block_on_its_own(monkeypatch):
    """Two draws of two blocks cost 1 + 3 and 3 + 1: their sums agree, but each block's mean has the variance 2 / 2."""
    losses = [(0, 0, 0, 1.0), (0, 0, 1, 3.0), (0, 1, 0, 3.0), (0, 1, 1, 1.0)]
    monkeypatch.setattr("hildanext.likelihood.conditional._losses", lambda *_: iter(losses))
    (score,) = score_diffusion(random_model(block_size=4), [Pair((0, 5, 9, 3), (1,) * 8)], draws=2)
    assert (score.nats, score.variance) == (4.0, 2.0)
    monkeypatch.undo()
    seen: set[int] = set()
    import hildanext.likelihood.conditional as module

    own = module._losses
    monkeypatch.setattr(module, "_losses", lambda *args: [seen.add(unit[2]) or unit for unit in own(*args)])
    score_diffusion(random_model(block_size=4), [Pair((0, 5), (1,) * 8)], draws=2)
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_a_lone_token_in_its_block_is_exact(alignment):
    model = random_model(alignment=alignment, block_size=4)
    pair = Pair((0, 5, 9, 33, 12, 8), (21,))
    (score,) = score_diffusion(model, [pair])
    assert score.kind == "exact" and score.forwards == 1
    assert score.nats == pytest.approx(-float(first_step(model, pair, (0,))[0].log_softmax(-1)[21]), abs=1e-9)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_a_pair_s_number_does_not_depend_on_its_batch(alignment, size):
    model = random_model(alignment=alignment, block_size=4)
    together = score_diffusion(model, PAIRS, size, draws=3, batch_size=5)
    for pair, score in zip(PAIRS, together, strict=True):
        (alone,) = score_diffusion(model, [pair], size, draws=3, batch_size=1)
        assert score.nats == pytest.approx(alone.nats, abs=1e-9) and score.variance == pytest.approx(alone.variance)


def test_only_the_continuation_counts_and_the_context_is_seen():
    model = random_model(alignment="parent", block_size=4)
    whole, first, rest = score_diffusion(
        model, [Pair((0, 5), (9, 33, 21)), Pair((0, 5), (9,)), Pair((0, 5, 9), (33, 21))], 1
    )
    assert whole.nats == pytest.approx(first.nats + rest.nats, abs=1e-9)
    seen, other = score_diffusion(model, [Pair((0, 5), (9, 33, 21)), Pair((0, 6), (9, 33, 21))], 4, draws=4)
    assert abs(seen.nats - other.nats) > 1e-3


def test_options_of_one_question_share_their_masks():
    from hildanext.likelihood.conditional import _plan

    short, long = (_plan(Pair((0, 5, 9), option, seed=7), 4, 8) for option in ((1, 2, 3, 4, 5), (6,) * 11))
    other = _plan(Pair((0, 5, 9), (1, 2, 3, 4, 5), seed=8), 4, 8)
    for (few, _), (many, _) in zip(short.masks, long.masks, strict=True):
        assert few == [offset for offset in many if offset < 5]
    assert short.masks != other.masks


def test_one_token_options_of_a_question_are_read_from_one_forward(monkeypatch):
    model = random_model(alignment="parent", block_size=4)
    options = [Pair((0, 5, 9, 33, 12), (token,)) for token in (21, 7, 40, 3)]
    alone = [score_diffusion(model, [option])[0].nats for option in options]
    rows: list[int] = []
    forward = type(model).forward

    def counted(self, embeddings, positions, attention):
        rows.append(len(embeddings))
        return forward(self, embeddings, positions, attention)

    monkeypatch.setattr(type(model), "forward", counted)
    together = [score.nats for score in score_diffusion(model, options)]
    assert rows == [1] and together == pytest.approx(alone, abs=1e-9)


def test_a_uniform_model_scores_the_logarithm_of_its_vocabulary_at_any_block_size():
    model = random_model(alignment="block", block_size=8, vocab=61)
    with torch.no_grad():
        model.head.zero_()
    for size in (1, 4, 8):
        for pair, score in zip(PAIRS, score_diffusion(model, PAIRS, size, draws=64), strict=True):
            want = len(pair.continuation) * torch.tensor(61.0).log().item()
            assert score.nats == pytest.approx(want, abs=max(1e-6, 4 * score.se))


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(PromptError, match="no context"):
        Pair((), (1,))
    with pytest.raises(PromptError, match="context is 512"):
        score_diffusion(random_model(), [Pair((0,) * 500, (1,) * 20)])
