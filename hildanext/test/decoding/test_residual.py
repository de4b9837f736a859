"""Residual context and the soft inputs under it: CV-11 to CV-13."""

from dataclasses import replace

import pytest
import torch

from conftest import random_model
from decoding_stubs import StubTokenizer
from hildanext.core.errors import ConfigError
from hildanext.core.registry import under_profile
from hildanext.decoding import Canvas, Decoder, Residual, ThresholdEdit, make_decoder
from hildanext.decoding.base import RowFacts, run, step
from hildanext.decoding.per_row import PerRow
from hildanext.decoding.state import DecodeState
from hildanext.engine.base import Request, complete
from hildanext.engine.local import LocalEngine, LocalEngineConfig
from hildanext.inference import GenerationConfig, generate
from hildanext.models.card import ResidualCard
from hildanext.models.soft_inputs import InputTable, SoftInputs, likely, mixture, normalized_entropy

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
KNOBS = [
    {"tau_mask": 0.2, "tau_edit": None},
    {"tau_mask": 0.2, "tau_edit": 0.3},
    {"tau_mask": 0.5, "tau_edit": 0.1, "window": 1},
    {"tau_mask": 0.2, "tau_edit": 0.2, "reveal": "klass", "fallback": "left"},
    {"tau_mask": 0.2, "tau_edit": None, "reveal": {"name": "credit", "entries": 2}, "temperature": 0.8},
]
SETTINGS = GenerationConfig(max_new_tokens=9, debug=True, trace=True)


def residual(**knobs) -> Residual:
    return Residual(untrained=True, **knobs)


def state_of(model, prompts=PROMPTS, new=12, **settings) -> DecodeState:
    limits = [len(prompt) + new for prompt in prompts]
    state = DecodeState(model, prompts, limits, lambda row, tokens: False, **settings)
    state.prefill()
    return state


class Watched(Decoder):
    """Remembers what was fed and what came of it, at each step."""

    def __init__(self, inner: Decoder) -> None:
        self.inner, self.steps = inner, []

    def needs(self, canvas):
        return self.inner.needs(canvas)

    def soft(self, canvas, input_table):
        soft = self.inner.soft(canvas, input_table)
        self.steps.append([canvas, soft])
        return soft

    def edit(self, logits, where, canvas):
        self.steps[-1].append(logits)
        return self.inner.edit(logits, where, canvas)


class Weightless(Residual):
    """Residuals are made and mixed, at weight zero."""

    def soft(self, canvas, input_table):
        soft = super().soft(canvas, input_table)
        return None if soft is None else SoftInputs(torch.zeros_like(soft.weight), soft.states)


@pytest.mark.parametrize("kind", [Residual, Weightless], ids=["off", "weight 0"])
@pytest.mark.parametrize("alignment", ["block", "parent"])
@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_without_weight_it_is_the_plain_decoder(knobs, alignment, kind):
    """CV-11: token for token and forward for forward."""
    for seed in range(2):
        model = random_model("qwen3", alignment, 4, seed=seed, layers=2)
        off = kind(**({"lam": 0.0} if kind is Residual else {"untrained": True, "top": 5}), **knobs)
        plain, other = (generate(model, None, PROMPTS, each, SETTINGS) for each in (ThresholdEdit(**knobs), off))
        for one, two in zip(plain, other, strict=True):
            assert one.tokens == two.tokens and one.trace == two.trace
            assert one.stats.denoise_forwards == two.stats.denoise_forwards


def test_off_asks_for_nothing():
    decoder = Residual(lam=0.0)
    state = state_of(random_model())
    canvas = state.canvas()
    logits = state.logits(canvas.masked)
    edit = decoder.edit(logits, canvas.masked, canvas)
    assert edit.memory == () and decoder.soft(replace(canvas, memory=(1, 2, 3)), lambda: 1 / 0) is None
    assert decoder.sampling == ThresholdEdit().sampling and residual().sampling is None


@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_each_block_begins_as_the_plain_decoder_does(alignment):
    """CV-12: nothing is fed in a block's first step, and something in every other that has masks."""
    model = random_model("llama", alignment, 4, seed=2)
    decoder = Watched(residual(tau_mask=0.9, tau_edit=None))
    run(decoder, state_of(model, [[5, 6, 7, 8]]))
    starts = [canvas.rows[0].start for canvas, *_ in decoder.steps]
    first = [at == 0 or starts[at - 1] != start for at, start in enumerate(starts)]
    fed = [soft is not None and bool((soft.weight > 0).any()) for _, soft, _ in decoder.steps]
    masks = [bool(canvas.masked.any()) for canvas, *_ in decoder.steps]
    assert sum(first) == 3 and fed == [not new and holds for new, holds in zip(first, masks, strict=True)]
    for (canvas, _, logits), new in zip(decoder.steps, first, strict=True):
        if new:  # the same prompt, decoded plainly up to here
            text = _text(model, canvas, decoder.steps)
            plain = state_of(model, [text], 4)
            where = plain.canvas().masked
            torch.testing.assert_close(plain.logits(where), logits, rtol=0, atol=1e-9)


def _text(model, canvas, steps):
    """What stood before a block: the prompt and the final tokens of the blocks before it."""
    text = [5, 6, 7, 8]
    for start in range(4, canvas.rows[0].start, 4):
        text += [part for part, *_ in steps if part.rows[0].start == start][-1].tokens[0].tolist()
    return text


def test_by_hand():
    """CV-13: p = [.5, .25, .25] has an entropy of 1.0397 nats, over ln 3 0.9464; a banned row counts nowhere."""
    p = torch.tensor([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3, 0.0]], dtype=torch.float64)
    alpha = normalized_entropy(p.log())
    assert alpha.tolist() == pytest.approx([0.9463946303571862, 0.0, 1.0], abs=1e-12) and alpha[1] == 0
    squared = p[:1] ** 2 / (p[:1] ** 2).sum()  # t_res 0.5: [4, 1, 1] / 6
    assert normalized_entropy(p[:1].log(), 0.5).tolist() == pytest.approx(normalized_entropy(squared.log()).tolist())
    assert normalized_entropy(p.log().float()).dtype == torch.float32
    table = torch.tensor([[1.0, 0.0], [0.0, 2.0], [4.0, 4.0], [99.0, 99.0]], dtype=torch.float64)
    for top in (0, 4, 9):
        delta = mixture(table, likely(p.log(), top))
        assert torch.allclose(delta, torch.tensor([[1.5, 1.5], [1.0, 0.0], [5 / 3, 2.0]], dtype=torch.float64))
    assert mixture(table, likely(p[:1].log(), 1)).tolist() == [[1.0, 0.0]]
    two = torch.tensor([[0.5, 0.3, 0.2, 0.0]], dtype=torch.float64)
    assert torch.allclose(mixture(table, likely(two.log(), 2)), torch.tensor([[0.625, 0.75]], dtype=torch.float64))
    embeddings = torch.arange(6, dtype=torch.float64).view(1, 3, 2)
    fed = SoftInputs(torch.tensor([[0.0, 0.25, 1.0]], dtype=torch.float64), 10 + embeddings).mixed(embeddings)
    assert fed.tolist() == [[[0.0, 1.0], [4.5, 5.5], [14.0, 15.0]]]


@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_a_step_feeds_masks_alone_and_by_the_distribution_of_their_own_position(alignment):
    """Against the equations, on whole documents under a dense mask."""
    model = random_model("qwen3", alignment, 4, seed=4)
    decoder = Watched(residual(tau_mask=0.9, tau_edit=None, top=0, t_res=0.7, lam=0.8))
    state = state_of(model, [[5, 6, 7, 8, 9]], 7, cached=False)
    fed = []
    forward = type(model).forward
    watch = lambda embeddings, *rest: (fed.append(embeddings), forward(model, embeddings, *rest))[1]  # noqa: E731
    model.forward = watch
    for _ in range(3):
        step(decoder, state, state.canvas())
    table = model.input_table.rows
    (before, nothing, logits), (canvas, soft, _), _ = decoder.steps
    assert nothing is None and torch.equal(fed[0][0, 4:], table[before.tokens[0]])
    still = canvas.masked[0]
    rows = logits[still[before.masked[0]]]
    assert still.sum() == 2 and soft.weight[0, ~still].eq(0).all()
    log_p = (rows / 0.7).log_softmax(-1)
    alpha = 0.8 * -(log_p.exp() * log_p.clamp_min(-1e30)).sum(-1) / torch.tensor(61.0, dtype=torch.float64).log()
    wanted = table[canvas.tokens[0]].clone()
    wanted[still] = (1 - alpha)[:, None] * wanted[still] + alpha[:, None] * (rows.softmax(-1) @ table)
    assert torch.equal(fed[1][0, 4:][~still], table[canvas.tokens[0, ~still]]), "not a bit of another token moves"
    torch.testing.assert_close(fed[1][0, 4:], wanted, rtol=0, atol=1e-12)
    assert torch.equal(fed[1][0, :4], table[torch.tensor([5, 6, 7, 8])]) and len(fed) == 3


def test_what_is_no_mask_is_never_mixed():
    """Whatever a decoder says."""
    model = random_model("llama", "block", 4)
    state = state_of(model, [[5, 6, 7], [5, 6, 7, 8, 9]])
    canvas = state.canvas()
    wild = SoftInputs(torch.ones(2, 4, dtype=torch.float64), torch.full((2, 4, 32), 7.0, dtype=torch.float64))
    fed = []
    model.embed = lambda tokens, embed=model.embed: (fed.append(tokens), embed(tokens))[1]
    laid = []
    inner = SoftInputs.mixed
    type(wild).mixed = lambda self, embeddings: (laid.append(self.weight), inner(self, embeddings))[1]
    try:
        state.logits(canvas.masked, wild)
    finally:
        type(wild).mixed = inner
    assert torch.equal(laid[0] > 0, fed[-1] == model.card.mask_id) and int((laid[0] > 0).sum()) == 1 + 3


@pytest.mark.parametrize("start", ["zero", "dirichlet"])
@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_rows_do_not_depend_on_company_nor_on_the_cache(knobs, start):
    model = random_model("llama", {"zero": "block", "dirichlet": "parent"}[start], 4, seed=3, layers=2)
    decoder = residual(start=start, top=8, **knobs)
    together = generate(model, None, PROMPTS, decoder, SETTINGS)
    for number, prompt in enumerate(PROMPTS):
        for other in (SETTINGS, replace(SETTINGS, cached=False), replace(SETTINGS, commit="separate")):
            (alone,) = generate(model, None, [prompt], decoder, other, seeds=[number])
            assert alone.tokens == together[number].tokens
            assert alone.stats.denoise_forwards == together[number].stats.denoise_forwards


def test_residuals_change_the_text_and_the_start_does():
    model = random_model("llama", "block", 8, seed=3)
    texts = []
    for knobs in ({"lam": 0.0}, {}, {"start": "dirichlet"}, {"top": 1}, {"t_res": 3.0}, {"lam": 0.5}):
        decoder = residual(tau_mask=0.2, tau_edit=None, **knobs)
        texts.append([done.tokens for done in generate(model, None, PROMPTS, decoder, replace(SETTINGS, seed=1))])
    assert all(one != other for at, one in enumerate(texts) for other in texts[:at])


def test_all_ids_as_the_top_are_the_dense_form():
    model = random_model("llama", "block", 4, seed=6)
    for start in ("zero", "dirichlet"):
        dense, top = (
            generate(model, None, PROMPTS, residual(tau_mask=0.2, tau_edit=0.3, top=top, start=start), SETTINGS)
            for top in (0, 64)
        )
        assert [one.tokens for one in dense] == [one.tokens for one in top]


def test_a_position_that_was_written_has_no_residual():
    """A mask keeps its residual; a place that was written and is a mask again has none, nor has one that opens."""
    decoder = residual(tau_edit=None, tau_mask=0.5, top=2)
    masked = torch.tensor([[True, True, True]])
    canvas = Canvas(
        torch.full((1, 3), 63),
        masked,
        ~masked,
        torch.zeros(1, 3, dtype=torch.float64),
        torch.zeros(1, dtype=torch.long),
    )
    logits = torch.tensor([[0.9, 0.05, 0.05], [0.4, 0.3, 0.3], [0.4, 0.4, 0.2]], dtype=torch.float64).log()
    edit = decoder.edit(logits, masked, canvas)
    assert edit.write[0].tolist() == [True, False, False]
    table = InputTable(torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.bool))
    again = replace(canvas, memory=edit.memory)
    weight, states = decoder.soft(again, lambda: table)
    assert weight[0, 0] == 0 and (weight[0, 1:] > 0.9).all()
    assert states[0, 2].tolist() == [0.5, 0.5, 0.0]
    fewer = replace(canvas, masked=torch.tensor([[False, True, False]]), memory=edit.memory)
    forgot = decoder.edit(logits[1:2] + 0.0, fewer.masked, fewer).memory
    assert forgot[0].weight.tolist() == [0.0, 0.0, 0.0], "the third is no mask any more, the second was written"


def test_it_shares_the_memory_with_its_rule():
    """KLASS with history 1 fills the same masks at the same logits, whoever wraps it."""
    rule = {"name": "klass", "history": 1, "epsilon": 10.0}
    model = random_model("llama", "block", 4, seed=1)
    plain, mixed = (
        ThresholdEdit(tau_mask=0.3, tau_edit=None, reveal=rule),
        residual(tau_mask=0.3, tau_edit=None, reveal=rule),
    )
    canvas = state_of(model).canvas()
    logits = state_of(model)
    logits.canvas()
    first = logits.logits(canvas.masked)
    one, other = plain.edit(first, canvas.masked, canvas), mixed.edit(first, canvas.masked, canvas)
    assert torch.equal(one.write, other.write)
    for mine, its in zip(one.memory, other.memory, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, its.rule, strict=True))
    one, other = (
        each.edit(first, canvas.masked, replace(canvas, memory=edit.memory))
        for each, edit in ((plain, one), (mixed, other))
    )
    assert torch.equal(one.write, other.write) and one.write.sum() > 3


def test_rows_with_decoders_of_their_own():
    model = random_model("qwen3", "block", 4, seed=8)
    ways = [ThresholdEdit(tau_mask=0.3, tau_edit=0.2), residual(tau_mask=0.3, tau_edit=0.2), residual(tau_mask=0.6)]
    texts = {}
    state = state_of(model, PROMPTS, 8, debug=True)
    state.ended = lambda row, tokens: bool(texts.update({row.index: tokens[row.prompt : row.limit]}))
    while (canvas := state.canvas()) is not None:
        step(PerRow([ways[row.index] for row in state.rows]), state, canvas)
    for number, prompt in enumerate(PROMPTS):
        (alone,) = generate(model, None, [prompt], ways[number], replace(SETTINGS, max_new_tokens=8), seeds=[number])
        assert alone.tokens == texts[number]
    nothing = PerRow([ThresholdEdit(), ThresholdEdit(tau_mask=0.1)])
    assert nothing.soft(state_of(model, PROMPTS[:2]).canvas(), lambda: 1 / 0) is None


def test_in_the_engine():
    model = random_model("llama", "parent", 4, seed=7)
    sections = [
        {"name": "residual", "untrained": True, "tau_mask": 0.3, "tau_edit": 0.2},
        {"name": "residual", "untrained": True, "start": "dirichlet", "tau_mask": 0.3, "tau_edit": None},
        {"name": "threshold_edit", "tau_mask": 0.3},
    ]
    engine = LocalEngine(model, StubTokenizer(bos=0), None, LocalEngineConfig(slots=3, quantum=1))
    try:
        with under_profile("FULL"):
            for number, section in enumerate(sections):
                request = Request(tokens=(5, 6, 7), decoder=section, max_new_tokens=10, seed=number)
                how = replace(SETTINGS, max_new_tokens=10)
                own = make_decoder(section)
                wanted = generate(model, StubTokenizer(bos=0), [[5, 6, 7]], own, how, seeds=[number])
                assert complete(engine, request).tokens == wanted[0].tokens
            with pytest.raises(ConfigError, match="not trained with residuals"):
                complete(engine, Request(tokens=(5,), decoder={"name": "residual"}, max_new_tokens=4))
            with pytest.raises(ConfigError, match="Residual has no trajectory"):
                complete(engine, Request(tokens=(5,), decoder=sections[0], max_new_tokens=4, trajectory=True))
    finally:
        engine.close()


def test_a_start_that_is_drawn_is_of_the_row_s_seed_and_the_block():
    table = InputTable(torch.eye(5, dtype=torch.float64), torch.tensor([False] * 4 + [True]))
    masked = torch.ones(3, 2, dtype=torch.bool)
    facts = (RowFacts(1, 0, False), RowFacts(2, 0, False), RowFacts(1, 2, False))
    parts = (torch.zeros(3, 2, dtype=torch.long), masked, ~masked, torch.zeros(3, 2, dtype=torch.float64))
    canvas = Canvas(*parts, torch.zeros(3, dtype=torch.long), facts)
    weight, states = residual(start="dirichlet", top=0).soft(canvas, lambda: table)
    assert ((0 < weight) & (weight < 1)).all() and len({*weight.flatten().tolist()}) == 6
    assert (states[..., 4] == 0).all() and torch.allclose(states.sum(-1), torch.ones(3, 2, dtype=torch.float64))
    again, _ = residual(start="dirichlet", top=0).soft(canvas, lambda: table)
    assert torch.equal(weight, again)


def test_a_checkpoint_must_have_been_trained_so(caplog):
    model = random_model()
    with pytest.raises(ConfigError, match="residual on a checkpoint that was not trained .* untrained: true"):
        generate(model, None, [[5]], Residual(), SETTINGS)
    generate(model, None, [[5]], residual(), replace(SETTINGS, max_new_tokens=2))
    assert "not trained with them: its text is worse" in caplog.text
    model.card = replace(model.card, residual=ResidualCard(lam=1.0, t_res=1.0, top=64))
    caplog.clear()
    generate(model, None, [[5]], Residual(), replace(SETTINGS, max_new_tokens=2))
    assert not caplog.text
    generate(random_model(), None, [[5]], Residual(lam=0.0), replace(SETTINGS, max_new_tokens=2))


def test_a_graph_that_takes_tokens_is_refused():
    model = random_model()
    model.takes_embeddings = False
    with pytest.raises(ConfigError, match="ONNX Runtime takes tokens: leave the runtime"):
        generate(model, None, [[5]], residual(), SETTINGS)


def test_bad_sections_are_one_line():
    with pytest.raises(ConfigError, match="'residual' is a FULL method"):
        make_decoder({"name": "residual"})
    with under_profile("FULL"):
        for knobs, says in (
            ({"lam": -0.1}, "lam: -0.1"),
            ({"lam": float("nan")}, "lam"),
            ({"t_res": 0.0}, "t_res: 0.0"),
            ({"top": -1}, "top: -1"),
            ({"start": "warm"}, "start: 'warm'"),
            ({"lamda": 1.0}, "unknown key 'lamda'"),
        ):
            with pytest.raises(ConfigError, match=says) as caught:
                make_decoder({"name": "residual", **knobs})
            assert "\n" not in str(caught.value)
    one, other = (residual(reveal={"name": "factor", "f": 1.0}) for _ in range(2))
    assert one == other and hash(one) == hash(other) and one != residual(reveal={"name": "factor", "f": 1.0}, lam=0.5)
