"""Likelihoods against brute force on tiny fp64 models and on the two-token toy of the conformance vectors."""

import itertools
import math

import pytest
import torch
from torch import nn

from hildanext import masks
from hildanext.data.batch import Batch, padding_tokens
from hildanext.diffusion import block_index, elbo_weight, mask_tokens
from hildanext.eval.evaluation import likelihood_cells
from hildanext.likelihood import LIKELIHOODS
from hildanext.likelihood.base import scored_tokens
from hildanext.likelihood.held_out import LikelihoodConfig, bound, exact, parent_likelihood
from hildanext.likelihood.masked_losses import masked_losses
from hildanext.masks import TokenRows
from hildanext.models import Card, DiffusionModel
from hildanext.models.attention.dense import MaskedAttention
from small_models import parent_of

EOS = 1
ALIGNMENTS = ["block", "parent"]


def batch_of(rows: list[list[list[int]]], seq: int, bos: bool = True) -> Batch:
    """Rows of documents; what is left of a row is padding. Position 0 is a BOS, not maskable."""
    shape = (len(rows), seq)
    tokens = torch.full(shape, EOS)
    document = torch.full(shape, -1)
    position = torch.zeros(shape, dtype=torch.long)
    for row, documents in enumerate(rows):
        at = 0
        for number, ids in enumerate(documents):
            part = slice(at, at + len(ids))
            tokens[row, part] = torch.tensor(ids)
            document[row, part] = number
            position[row, part] = torch.arange(len(ids))
            at += len(ids)
    maskable = document >= 0
    if bos:
        maskable &= position > 0
    return Batch(tokens, document, position, maskable)


def text(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [0, *torch.randint(2, 60, (length - 1,), generator=generator).tolist()]


@pytest.fixture
def batch() -> Batch:
    return batch_of([[text(8, 1), text(8, 2)], [text(12, 3)]], 16)


def log_p(model: DiffusionModel, document: list[int], shown: dict[int, bool], block_size: int, target: int) -> float:
    """log p(target | clean earlier blocks, the block as shown), by one single-copy forward of an inference layout."""
    block = target // block_size
    start, end = block * block_size, min((block + 1) * block_size, len(document))
    tokens = list(document[:end])
    for place in range(start, end):
        if not shown.get(place, place == 0):
            tokens[place] = model.card.mask_id
    place = torch.arange(end)[None]
    rows = TokenRows(torch.zeros_like(place), place, place >= start)
    mask = masks.may_attend(rows, rows, block_size, model.card.clean_mask)
    with torch.no_grad():
        hidden = model(model.embed(torch.tensor([tokens])), place, MaskedAttention(mask))
        read = target if model.card.shift == "none" else target - 1
        return float(model.logits(hidden[0, read]).log_softmax(-1)[document[target]])


def average_over_orders(model: DiffusionModel, document: list[int], block_size: int) -> float:
    """-log p of a document when each block is revealed in every possible order."""
    total = 0.0
    for start in range(0, len(document), block_size):
        places = [place for place in range(start, min(start + block_size, len(document))) if place > 0]
        values = []
        for order in itertools.permutations(places):
            shown = {0: True}
            value = 0.0
            for place in order:
                value -= log_p(model, document, shown, block_size, place)
                shown[place] = True
            values.append(value)
        total += sum(values) / len(values)
    return total


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_block_size_one_is_the_token_by_token_probability(make_model, batch, family, alignment):
    """Everything masked, weight 1, one forward; each token against its own forward."""
    model = make_model(family, alignment)
    documents = [text(8, 1), text(8, 2), text(12, 3)]
    wanted = -sum(log_p(model, ids, {}, 1, place) for ids in documents for place in range(1, len(ids)))
    likelihood = exact(model, [batch], EOS)
    assert likelihood.kind == "exact" and likelihood.tokens == 25 and likelihood.se == 0 and likelihood.forwards == 1
    assert likelihood.real_nll == pytest.approx(wanted, abs=1e-9)


def test_parent_alignment_at_block_size_one_is_the_parent(make_model, batch):
    model = make_model("qwen3", "parent")
    parent = parent_of(model)
    ours, theirs = exact(model, [batch], EOS), parent_likelihood(parent, [batch], EOS)
    assert ours.nats_per_token == pytest.approx(theirs.nats_per_token, abs=1e-9)
    assert ours.tokens == theirs.tokens


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("estimator", ["count", "time", "coupled"])
def test_the_bound_is_the_average_over_orders(make_model, alignment, estimator):
    """For three estimators; many copies of one row make many draws."""
    model = make_model("llama", alignment)
    documents = [text(4, 5), text(6, 6)]
    wanted = sum(average_over_orders(model, ids, 4) for ids in documents) / 8
    copies = batch_of([documents] * 48, 10)
    estimate = bound(model, [copies], 4, EOS, LikelihoodConfig(estimator=estimator, draws=24, seed=1))
    assert estimate.kind == "bound" and estimate.se > 0
    assert abs(estimate.nats_per_token - wanted) < 4 * estimate.se
    assert estimate.se < 0.06 * wanted


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_the_standard_error_is_the_spread_of_repeated_estimates(make_model, batch, alignment):
    """Over sixty seeds; the formula takes stratified draws for independent ones."""
    model = make_model("llama", alignment, layers=1)
    estimates = [bound(model, [batch], 4, EOS, LikelihoodConfig(draws=4, seed=seed)) for seed in range(60)]
    nats = torch.tensor([estimate.nats_per_token for estimate in estimates])
    claimed = sum(estimate.se for estimate in estimates) / len(estimates)
    assert 0.6 * claimed < float(nats.std()) < 1.15 * claimed


def test_one_draw_has_a_standard_error_too(make_model, batch):
    estimate = bound(make_model(), [batch], 4, EOS, LikelihoodConfig(draws=1))
    assert estimate.se > 0


def test_of_one_block_or_one_row_no_error_is_claimed(make_model):
    row = batch_of([[text(4, 5)]], 4)
    found = bound(make_model("llama", "parent"), [row], 4, EOS, LikelihoodConfig(draws=1))
    assert math.isnan(found.se) and math.isnan(found.text_se) and found.nats_per_token > 0
    assert "±" not in likelihood_cells({"name": "", **found.plain()})[2]


def test_more_than_one_batch_is_one_text(make_model, batch):
    model = make_model("llama", "parent")
    whole = exact(model, [batch], EOS, chunk=5)
    names = ("tokens", "document", "position", "maskable")
    rows = [Batch(*(getattr(batch, name)[row : row + 1] for name in names)) for row in range(2)]
    parts = exact(model, rows, EOS)
    assert parts.nats_per_token == pytest.approx(whole.nats_per_token, abs=1e-10)
    assert parts.text_se == pytest.approx(whole.text_se, abs=1e-10) and parts.text_se > 0


@pytest.mark.parametrize("block_size", [1, 2, 4, 16])
@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_every_model_is_asked_about_the_same_tokens(make_model, alignment, block_size):
    """Documents without a BOS: position 0 is given, never scored, in any alignment and at any block size."""
    without_bos = batch_of([[text(8, 1), text(6, 2)]], 16, bos=False)
    estimate = bound(make_model("qwen3", alignment), [without_bos], block_size, EOS, LikelihoodConfig(draws=2))
    assert estimate.tokens == 7 + 5


def test_padding_is_in_the_sum_of_a_bound_but_not_in_its_count(make_model):
    document = [*text(6, 4), EOS]
    padded, bare = batch_of([[[*document, EOS, EOS]]], 12), batch_of([[document]], 12)
    assert padding_tokens(padded.tokens, padded.document, EOS).sum() == 2
    model = make_model("llama", "parent")
    with_padding, without = exact(model, [padded], EOS), exact(model, [bare], EOS)
    assert with_padding.tokens == without.tokens == 6
    assert with_padding.padding_nll > 0 and with_padding.nats_per_token == pytest.approx(
        without.nats_per_token, abs=1e-10
    )
    blocks = bound(model, [padded], 4, EOS, LikelihoodConfig())
    assert blocks.tokens == 6 and blocks.nats_per_token == pytest.approx((blocks.real_nll + blocks.padding_nll) / 6)
    assert blocks.nats_per_token > blocks.nats_without_padding


def test_an_eos_of_the_next_document_is_not_padding():
    batch = batch_of([[[0, 5, EOS], [EOS, 7, EOS]]], 8)
    assert padding_tokens(batch.tokens, batch.document, EOS).sum() == 0


def test_every_draw_masks_as_many_tokens_as_its_weight_says(batch):
    scored, blocks = scored_tokens(batch), block_index(batch.document, batch.position, 4)
    sizes = torch.bincount(blocks[scored], minlength=int(blocks.max()) + 1)
    levels = []
    for pair in LIKELIHOODS["count"](draws=4).noisings(scored, blocks, torch.Generator().manual_seed(0)):
        ((masked, weight),) = pair
        assert not (masked & ~scored).any()
        masks_in = torch.bincount(blocks[masked], minlength=len(sizes))
        levels.append(masks_in)
        for block, n in enumerate(sizes.tolist()):
            if n:
                assert 1 <= masks_in[block] <= n
                assert float(weight[blocks == block][0]) == pytest.approx(n / int(masks_in[block]))
    full = sizes == 4
    assert (torch.stack(levels).sort(0).values[:, full] == torch.arange(1, 5)[:, None]).all(), "not stratified"


# --- a toy of two tokens, of known likelihood ------------------------------------------------------------------

P = {(0, 0): 0.4, (0, 1): 0.1, (1, 0): 0.2, (1, 1): 0.3}
MASK, BOS = 2, 3


class Toy(DiffusionModel):
    """Exact conditionals of the pair (x1, x2) after a BOS; tokens 0, 1, mask 2, BOS 3. `hidden` is the logits."""

    def __init__(self, conditional) -> None:
        nn.Module.__init__(self)
        conventions = {"shift": "none", "clean_mask": "block_causal"}
        self.card = Card(mask_id=MASK, vocab_rows=4, vocab_real=4, block_size=4, **conventions)
        self.conditional = conditional
        self.register_buffer("banned", torch.tensor([False, False, True, True]))

    device = property(lambda self: torch.device("cpu"))
    head = property(lambda self: torch.eye(4, dtype=torch.float64))

    def embed(self, tokens, mask_noise=0.0, generator=None):
        return nn.functional.one_hot(tokens, 4).double()

    def forward(self, embeddings, positions, attention):
        tokens = embeddings.argmax(-1)
        out = torch.zeros_like(embeddings)
        for place, other in ((1, 2), (2, 1)):
            for seen in (0, 1, MASK):
                rows = tokens[:, other] == seen
                out[rows, place, :2] = torch.tensor(self.conditional(place, seen), dtype=torch.float64).log()
        return out


def from_joint(place: int, seen: int) -> list[float]:
    def mass(value: int) -> float:
        return sum(p for pair, p in P.items() if pair[place - 1] == value and seen in (MASK, pair[2 - place]))

    return [mass(0) / (mass(0) + mass(1)), mass(1) / (mass(0) + mass(1))]


def inconsistent(place: int, seen: int) -> list[float]:
    """.5 with no context, .8 for the token 0 with context."""
    return [0.5, 0.5] if seen == MASK else [0.8, 0.2]


@pytest.mark.parametrize("estimator", ["count", "time", "coupled"])
@pytest.mark.parametrize(
    ("pair", "nll"), [((0, 0), 0.916291), ((0, 1), 2.302585), ((1, 0), 1.609438), ((1, 1), 1.203973)]
)
def test_with_exact_conditionals_the_bound_is_tight(pair, nll, estimator):
    """NELBO(x) = -log p(x); here per token, two tokens."""
    copies = batch_of([[[BOS, *pair]]] * 4000, 3)
    estimate = bound(Toy(from_joint), [copies], 4, EOS + 9, LikelihoodConfig(estimator=estimator, draws=4, seed=3))
    assert abs(2 * estimate.nats_per_token - nll) < 8 * estimate.se
    assert estimate.se < 0.02


def test_an_inconsistent_model_gets_the_looser_bound():
    copies = batch_of([[[BOS, 0, 0]]] * 4000, 3)
    estimate = bound(Toy(inconsistent), [copies], 4, EOS + 9, LikelihoodConfig(draws=4))
    assert abs(2 * estimate.nats_per_token - 0.916291) < 8 * estimate.se


def test_a_coupled_draw_has_the_values_of_the_vector():
    """k = 0, 1, 2 give .75 * 1.609438, 1.5 * 2.995732, .75 * 1.609438; complements cover each token once."""
    copies = batch_of([[[BOS, 0, 1]]] * 3000, 3)
    scored, blocks = scored_tokens(copies), block_index(copies.document, copies.position, 4)
    generator = torch.Generator().manual_seed(0)
    (first, weight), (second, other) = next(LIKELIHOODS["coupled"](draws=1).noisings(scored, blocks, generator))
    assert not (first & second).any() and ((first | second) == scored).all()
    model = Toy(from_joint)
    total = torch.zeros(3000, dtype=torch.float64)
    for masked, w in ((first, weight), (second, other)):
        sure = torch.ones(masked.shape)
        view = mask_tokens(copies.tokens, copies.document, copies.position, masked, sure, 4, MASK, generator)
        total += (w * masked_losses(model, view).nll).sum(-1) / 2
    values = sorted({round(value, 5) for value in total.tolist()})
    assert values == pytest.approx([0.75 * 1.609438, 1.5 * 2.995732], abs=1e-5)
    assert float(total.mean()) == pytest.approx(2.302585, abs=0.1)


@pytest.mark.parametrize(("weighting", "wanted"), [("elbo", 2.233270), ("mean", 1.209303)])
def test_a_clipped_noise_level_is_biased(weighting, wanted):
    """t in [.3, .8] with 1/t, and the unweighted mean over masked tokens given at least one mask."""
    rows = 60_000
    copies = batch_of([[[BOS, 0, 1]]] * rows, 3)
    generator = torch.Generator().manual_seed(0)
    time = (0.3 + 0.5 * torch.rand(rows, 1, generator=generator)).expand(rows, 3)
    view = mask_tokens(copies.tokens, copies.document, copies.position, copies.maskable, time, 4, MASK, generator)
    losses = masked_losses(Toy(from_joint), view, chunk=4096).nll
    if weighting == "elbo":
        value = float((elbo_weight(view) * losses).sum() / rows)
    else:
        count = view.masked.sum(-1)
        assert float((count == 0).float().mean()) == pytest.approx(0.223333, abs=0.006)
        value = float((losses.sum(-1)[count > 0] / count[count > 0]).mean())
    assert value == pytest.approx(wanted, abs=0.015)


def test_perplexity_of_hopeless_text_is_finite(make_model, batch):
    likelihood = exact(make_model(), [batch], EOS)
    assert math.isfinite(likelihood.perplexity) and likelihood.plain()["perplexity"] == likelihood.perplexity
