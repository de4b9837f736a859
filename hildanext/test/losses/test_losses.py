"""Losses: their scale, their gradients, and what each prediction may and may not see."""

import math
from dataclasses import replace

import numpy
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import random_model
from hildanext import masks
from hildanext.ar import Parent
from hildanext.core.errors import ConfigError, UnknownChoice
from hildanext.core.registry import build, under_profile
from hildanext.corruption.input_layout import build_layout
from hildanext.diffusion import (
    CausalPairs,
    NoisedBatch,
    complement,
    replace_tokens,
)
from hildanext.losses import LOSSES, SupervisedStep
from hildanext.losses.autoregressive import Autoregressive
from hildanext.losses.distillation import ParentDistillation
from hildanext.losses.linear_cross_entropy import linear_cross_entropy
from hildanext.losses.mask_to_token import MaskToToken
from hildanext.losses.representation import RepresentationAlignment
from hildanext.losses.token_to_token import TokenToToken
from hildanext.models.attention.blockwise import DoubledAttention, aligned
from hildanext.models.attention.dense import MaskedAttention
from hildanext.models.lora import LoraConfig, add_lora, without_lora
from noised_examples import MASK, make_view, model_input, noisy_logits, right_at_the_end

CASES = [  # every loss, once mild and once harsh
    {"name": "m2t"},
    {"name": "m2t", "weight": 3.0, "weighting": "uniform"},
    {"name": "m2t", "weighting": "masked_mean"},
    {"name": "t2t"},
    {"name": "t2t", "weighting": "mean"},
    {"name": "t2t", "weight": 5.0, "keep": 2.0, "keep_share": 1.0},
    {"name": "ar"},
    {"name": "ar", "weight": 2.0},
    {"name": "align"},
    {"name": "align", "weight": 10.0},
    {"name": "cap"},
    {"name": "cap", "weight": 20.0},
    {"name": "kl"},
    {"name": "kl", "weight": 4.0, "elbo": False},
    {"name": "c2dlm"},
    {"name": "c2dlm", "apply": "both", "loss": "mass", "reattention": "v_out_norm", "layers": "all", "lambda_c": 9.0},
]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_parent_alignment_at_block_size_one_is_the_parent(family):
    """Before training the diffusion loss equals the parent's next-token loss, to rounding."""
    model = random_model(family, "parent")
    view = make_view(length=13, block=1, t=1.0, documents=[0] * 6 + [1] * 5 + [-1] * 2)
    outcome = SupervisedStep(model, {"m2t": MaskToToken()})(view)
    exact = Parent(model.causal_lm, None, model.banned).token_nll(view.clean, view.document, view.position)
    assert outcome.total.item() == pytest.approx(float(exact.sum()), rel=1e-12)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_doubling_at_block_size_one_says_the_same(family):
    """The shortcut that drops the noisy half changes nothing."""
    model = random_model(family, "parent")
    view = make_view(length=8, block=1, t=1.0)
    short = noisy_logits(model, view)
    tokens, positions = model_input(view, build_layout(view, "double"))
    hidden = model(
        model.embed(tokens), positions, MaskedAttention(masks.doubled(view.document, view.position, 1, "token_causal"))
    )
    index = build_layout(view, "double").prediction_index(view.position, 1, "left")
    long = model.logits(hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1])))
    assert torch.allclose(short[:, 1:, :MASK], long[:, 1:, :MASK], atol=1e-10)


def test_a_weight_of_one_over_t_counts_masked_tokens_for_all():
    """t = 0.5, two of four tokens masked with CE 1.2 and 0.8: sum 4.0, per maskable token 1.0."""
    time = torch.full((1, 4), 0.5)
    masked = torch.tensor([[False, True, False, True]])
    view = replace(make_view(length=4, batch=1), masked=masked, time=time)
    weight = MaskToToken().weights(view, torch.ones(1, 4, dtype=torch.bool)).cross_entropy
    total = (weight * torch.tensor([[9.0, 1.2, 9.0, 0.8]])).sum()
    assert float(total) == pytest.approx(4.0)
    assert float(total) / 4 == pytest.approx(1.0)


def test_a_constant_cross_entropy_is_its_own_expectation():
    totals = []
    for seed in range(400):
        view = make_view(length=32, block=8, seed=seed)
        weight = MaskToToken().weights(view, torch.ones_like(view.masked)).cross_entropy
        totals.append(float(weight.sum()) / view.clean.numel())
    mean = sum(totals) / len(totals)
    spread = torch.tensor(totals).std() / len(totals) ** 0.5
    assert abs(mean - 1.0) < 4 * float(spread)


def test_full_sequence_rows_equal_the_single_copy():
    model = random_model()
    view = make_view(length=8, block=8)
    tokens, positions = model_input(view, build_layout(view, "double"))
    both = model(model.embed(tokens), positions, MaskedAttention(masks.doubled(view.document, view.position, 8)))
    single = model(model.embed(view.noisy), view.position, MaskedAttention(masks.same_document(view.document)))
    assert torch.allclose(both[:, :8], single, atol=1e-10)


def test_wrong_positions_change_later_blocks_and_not_the_first():
    model = random_model()
    view = make_view(length=8, block=4)
    tokens, positions = model_input(view, build_layout(view, "double"))
    mask = MaskedAttention(masks.doubled(view.document, view.position, 4))
    right = model(model.embed(tokens), positions, mask)
    wrong = model(model.embed(tokens), torch.arange(16).repeat(2, 1), mask)
    assert torch.allclose(right[:, :4], wrong[:, :4], atol=1e-10)
    assert float((right[:, 4:8] - wrong[:, 4:8]).abs().max().detach()) > 1e-3


@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_bidirectional_inside_a_block_and_blind_outside(alignment):
    """x_0 of this block or later, and x_t of other blocks, are not seen."""
    model = random_model(alignment=alignment)
    view = make_view(length=12, batch=1, t=0.5)
    base = noisy_logits(model, view)[:, :, :MASK]
    inside = replace(view, noisy=view.noisy.index_fill(1, torch.tensor([7]), 3))
    moved = (noisy_logits(model, inside)[:, :, :MASK] - base).abs().amax(-1)[0]
    first = 4 if alignment == "block" else 5  # under the left shift a block's first token reads the clean half
    assert float(moved.detach()[first:8].min()) > 1e-5
    assert float(moved.detach()[:first].max()) == 0.0 and float(moved.detach()[8:].max()) == 0.0
    later = replace(view, clean=view.clean.index_fill(1, torch.tensor([9]), 3))
    moved = (noisy_logits(model, later)[:, :, :MASK] - base).abs().amax(-1)[0]
    assert float(moved.detach()[:9].max()) == 0.0


def test_documents_do_not_leak():
    """Changing any token of document 1 leaves every logit of document 0 bit-identical."""
    model = random_model()
    view = make_view(length=12, documents=[0] * 5 + [1] * 7)
    base = noisy_logits(model, view)
    other = view.document == 1
    changed = replace(
        view, clean=torch.where(other, (view.clean + 1) % MASK, view.clean), noisy=torch.where(other, 5, view.noisy)
    )
    assert torch.equal(noisy_logits(model, changed)[:, :5], base[:, :5])


def test_first_token_of_a_block_is_read_from_the_clean_half():
    model = random_model(alignment="parent")
    view = make_view(length=12, batch=1, t=0.5)
    base = noisy_logits(model, view)[0, 4]
    noise = view.noisy.clone()
    noise[:, :4] = torch.tensor([1, 2, 3, 4])
    assert torch.equal(noisy_logits(model, replace(view, noisy=noise))[0, 4], base)
    clean = view.clean.clone()
    clean[:, 3] = (clean[:, 3] + 1) % MASK
    assert (
        float((noisy_logits(model, replace(view, clean=clean))[0, 4, :MASK] - base[:MASK]).abs().max().detach()) > 1e-5
    )


def test_an_autoregressive_loss_on_a_block_causal_half_is_refused():
    with pytest.raises(ConfigError, match="leaks its labels"):
        SupervisedStep(random_model(alignment="block"), {"ar": Autoregressive()})
    SupervisedStep(random_model(alignment="parent"), {"ar": Autoregressive()})


@pytest.mark.parametrize("block", [16, 32], ids=["as long as the row", "longer than the row"])
def test_an_autoregressive_loss_does_not_see_its_labels_where_one_block_spans_the_row(block):
    """A single copy would be noisy and bidirectional; the loss is the parent's own, other losses stay as they are."""
    model = random_model(alignment="parent")
    view = make_view(length=16, block=block, t=0.3, documents=[0] * 9 + [1] * 7)
    exact = Parent(model.causal_lm, None, model.banned).token_nll(view.clean, view.document, view.position)
    outcome = SupervisedStep(model, {"m2t": MaskToToken(), "ar": Autoregressive(weight=0.5)})(view)
    alone = SupervisedStep(model, {"m2t": MaskToToken()})(view)
    assert outcome.losses["ar"].item() == pytest.approx(0.5 * float(exact.sum()), rel=1e-10)
    assert outcome.losses["m2t"].item() == pytest.approx(alone.losses["m2t"].item(), rel=1e-10)
    silent = SupervisedStep(model, {"m2t": MaskToToken(), "ar": Autoregressive(weight=0.0)})(view)
    assert torch.equal(silent.total, alone.total), "a loss of weight zero does not even change the layout"


def test_mask_delta_learns_through_masks_alone():
    plain = random_model()
    from hildanext.models import DiffusionModel

    model = DiffusionModel(plain.causal_lm, plain.card, mask_delta=True)
    for parameter in model.causal_lm.parameters():
        parameter.requires_grad_(False)
    model.mask_delta.data = model.mask_delta.data.double()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 32
    view = make_view(t=0.5)
    assert torch.equal(noisy_logits(model, view), noisy_logits(plain, view))
    SupervisedStep(model, {"m2t": MaskToToken()})(view).total.backward()
    assert float(model.mask_delta.grad.abs().max()) > 0
    model.mask_delta.grad = None
    clear = replace(view, noisy=view.clean, masked=torch.zeros_like(view.masked), replaced=view.maskable)
    SupervisedStep(model, {"t2t": TokenToToken()})(clear).total.backward()
    assert float(model.mask_delta.grad.abs().max()) == 0.0


@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_mask_noise_is_measured_in_deviations_of_the_trained_rows(scale):
    """A small model's rows and a large model's get the same relative noise, and only at masks."""
    model = random_model()
    matrix = model.causal_lm.get_input_embeddings().weight
    with torch.no_grad():
        matrix.mul_(scale)
        matrix[MASK:] = 1000.0  # the mask and the unused rows are not what the unit is taken from
    tokens = torch.full((8, 512), MASK)
    tokens[:, ::2] = 3
    with torch.no_grad():
        noise = model.embed(tokens, 0.5, torch.Generator().manual_seed(0)) - model.embed(tokens)
    assert float(noise[:, ::2].abs().max()) == 0.0
    assert float(noise[:, 1::2].std()) == pytest.approx(0.5 * float(matrix[:MASK].detach().std()), rel=0.01)


def test_mask_noise_is_drawn_where_its_generator_lives(monkeypatch):
    """Torch refuses to draw on another device than the generator's. A seed gives the same noise everywhere."""
    model = random_model().to("meta")
    draw, devices = torch.randn, []

    def randn(*size, **how):
        devices.append(torch.device(how.get("device") or "cpu").type)
        return draw(*size, **how)

    monkeypatch.setattr(torch, "randn", randn)
    noisy = model.embed(torch.full((1, 4), MASK, device="meta"), 0.5, torch.Generator().manual_seed(0))
    assert noisy.device.type == "meta" and devices == ["cpu"]


@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_chunked_loss_and_gradients_equal_the_dense_ones(chunk):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(11, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(20, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher_hidden = torch.randn(11, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 18, (11,), generator=generator)
    weight, also = torch.rand(11, generator=generator).double(), torch.rand(11, generator=generator).double()
    banned = torch.arange(20) >= 18
    ours = linear_cross_entropy(hidden, head, labels, weight, banned, also, teacher_hidden, head.detach(), chunk)
    ours_gradients = torch.autograd.grad(ours.total * 0.7, (hidden, head))
    logp = (hidden @ head.T).masked_fill(banned, -math.inf).log_softmax(-1)
    teacher = (teacher_hidden @ head.detach().T).masked_fill(banned, -math.inf).log_softmax(-1)
    ce = -logp.gather(1, labels[:, None])[:, 0]
    kl = (teacher.exp() * (teacher - logp)).masked_fill(banned, 0.0).sum(-1)
    theirs = (weight * ce + also * kl).sum()
    theirs_gradients = torch.autograd.grad(theirs * 0.7, (hidden, head))
    assert torch.allclose(ours.total, theirs, atol=1e-10)
    assert torch.allclose(ours.cross_entropy, ce, atol=1e-10) and torch.allclose(ours.divergence, kl, atol=1e-10)
    for mine, reference in zip(ours_gradients, theirs_gradients, strict=True):
        assert torch.allclose(mine, reference, atol=1e-10)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_loss_that_nobody_differentiates_forms_no_gradient(mode):
    """One product per chunk: hidden states times head. The weights ask for gradients, a validation does not."""

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Products.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.matmul)
            return func(*args, **(kwargs or {}))

    hidden, head = (torch.randn(8, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    labels, weight, banned = torch.zeros(8, dtype=torch.long), torch.ones(8), torch.arange(8) >= 7
    asked = linear_cross_entropy(hidden, head, labels, weight, banned, chunk=4).total
    with mode(), Products():
        loss = linear_cross_entropy(hidden, head, labels, weight, banned, chunk=4).total
    assert Products.count == 2 and not loss.requires_grad and asked.requires_grad
    assert loss.item() == asked.item()


def test_no_supervised_row_is_a_zero_loss_with_finite_gradients():
    model = random_model()
    view = replace(make_view(), masked=torch.zeros(2, 16, dtype=torch.bool))
    outcome = SupervisedStep(model, {"m2t": MaskToToken()})(view)
    outcome.total.backward()
    assert outcome.total.item() == 0.0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_equal_parameters_and_equal_noise_give_a_ratio_of_one():
    model = random_model()
    step = SupervisedStep(model, {"m2t": MaskToToken()})
    first, second = step(make_view(seed=3)).total, step(make_view(seed=3)).total
    assert (first - second).item() == 0.0
    assert (first - step(replace(make_view(seed=3), noisy=make_view(seed=4).noisy)).total).item() != 0.0


@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_a_loss_of_weight_zero_changes_nothing(alignment):
    """Bit for bit, in loss and gradients."""
    model = random_model(alignment=alignment)
    teacher = torch.randn(2, 16, 32, dtype=torch.float64)
    results = []
    for losses in (
        {"m2t": MaskToToken()},
        {"m2t": MaskToToken(), "kl": ParentDistillation(weight=0.0), "ar": Autoregressive(weight=0.0)},
    ):
        model.zero_grad()
        outcome = SupervisedStep(model, losses, model.head.detach())(make_view(t=0.5), teacher_hidden=teacher)
        outcome.total.backward()
        results.append((outcome.total.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_with_adapters_off_the_teacher_is_the_parent_and_kl_starts_at_zero():
    model = random_model(alignment="parent")
    view = make_view(block=1, t=1.0)
    before = Parent(model.causal_lm, None).hidden(view.clean, view.document, view.position)
    add_lora(model, LoraConfig(rank=4, alpha=8))
    model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    trained = Parent(model.causal_lm, None).hidden(view.clean, view.document, view.position)
    assert not torch.allclose(trained, before)
    with without_lora(model):
        off = Parent(model.causal_lm, None).hidden(view.clean, view.document, view.position)
    assert torch.allclose(off, before, atol=1e-12)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    step = SupervisedStep(model, {"kl": ParentDistillation()}, model.head.detach())
    assert abs(step(view, teacher_hidden=off).total.item()) < 1e-10


def lora_model(dropout):
    """A model in training, whose adapters say something."""
    model = random_model(alignment="parent")
    add_lora(model, LoraConfig(rank=4, alpha=8, dropout=dropout))
    model.double()
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return model


def test_dropout_draws_from_the_step_s_generator_and_from_nothing_else():
    """So a resumed run drops what the first one would have; the global generator is left as it was."""
    step = SupervisedStep(lora_model(0.3), {"m2t": MaskToToken()}).train()
    totals = []
    for noise, seed in enumerate((3, 3, 4)):
        torch.manual_seed(noise)
        before = torch.random.get_rng_state()
        totals.append(step(make_view(), 0.1, torch.Generator().manual_seed(seed)).total.item())
        assert torch.equal(torch.random.get_rng_state(), before)
    assert totals[0] == totals[1] != totals[2]


def test_without_dropout_nothing_is_drawn_for_it():
    generator = torch.Generator().manual_seed(0)
    for step, training in ((lora_model(0.0), True), (lora_model(0.3), False)):
        SupervisedStep(step, {"m2t": MaskToToken()}).train(training)(make_view(), 0.0, generator)
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())


def test_alignment_is_one_minus_the_cosine_at_masked_tokens():
    """At block size 1 under the parent's alignment the states are the parent's own, and the loss is zero."""
    model = random_model(alignment="parent")
    step = SupervisedStep(model, {"align": RepresentationAlignment()})
    view = make_view(block=1, t=1.0)
    own = Parent(model.causal_lm, None).hidden(view.clean, view.document, view.position)
    assert abs(step(view, teacher_hidden=own).total.item()) < 1e-10
    assert step(view, teacher_hidden=-own).total.item() == pytest.approx(2.0 * 2 * 15, rel=1e-9)


@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_padding_gives_no_nan(alignment):
    model = random_model(alignment=alignment)
    view = make_view(length=16, documents=[0] * 7 + [1] * 4 + [-1] * 5)
    outcome = SupervisedStep(model, {"m2t": MaskToToken(), "t2t": TokenToToken()})(view)
    outcome.total.backward()
    assert math.isfinite(outcome.total.item())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("clean_mask", ["block_causal", "token_causal"])
@pytest.mark.parametrize("documents", [[0] * 16, [0] * 8 + [1] * 4 + [-1] * 4])
def test_attention_by_blocks_equals_the_dense_mask(clean_mask, documents):
    model = random_model("llama")
    view = make_view(documents=documents)
    assert aligned(view.document, view.position, 4)
    tokens, positions = model_input(view, build_layout(view, "double"))
    dense = MaskedAttention(masks.doubled(view.document, view.position, 4, clean_mask))
    blocks = DoubledAttention.build(build_layout(view, "double").rows(view), 16, 4, clean_mask, torch.float64)
    here = torch.cat([view.document, view.document], 1) >= 0
    a, b = (model(model.embed(tokens), positions, context)[here] for context in (dense, blocks))
    assert torch.allclose(a, b, atol=1e-10)


def test_blocks_off_the_row_grid_are_noticed():
    view = make_view(documents=[0] * 6 + [1] * 10)
    assert not aligned(view.document, view.position, 4)
    assert not aligned(*(x[:, :14] for x in (make_view().document, make_view().position)), 4)


def test_the_first_turn_drafts_what_the_next_one_mends():
    model = random_model()
    view = make_view(t=0.9)
    outcome = SupervisedStep(model, {"m2t": MaskToToken()})(
        view, generator=torch.Generator().manual_seed(0), wants_draft=True
    )
    best = noisy_logits(model, view).argmax(-1)
    written = outcome.draft != view.noisy
    assert bool(written.any())
    assert torch.equal(outcome.draft[written], best[written])
    assert torch.equal(outcome.draft[~view.masked], best[~view.masked])


@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.4, 0.7, 1.0])
def test_a_share_of_the_kept_tokens_stands_for_all_of_them(share, complementary):
    """Whatever the share, the weights add up to `keep` for each kept token, within four standard errors."""
    loss, chosen, kept = TokenToToken(weight=0.0, keep=0.6, keep_share=share), 0, 0
    for seed in range(20):
        view = make_view(length=64, batch=32, seed=seed)
        view = complement(view, MASK) if complementary else view
        weight = loss.weights(view, torch.ones_like(view.masked)).cross_entropy
        assert bool(((weight == 0) | (weight - 0.6 / share).abs().lt(1e-6)).all())
        assert not bool(weight[~view.kept].any())
        chosen, kept = chosen + int((weight > 0).sum()), kept + int(view.kept.sum())
    assert abs(chosen - share * kept) <= 4 * (kept * share * (1 - share)) ** 0.5


def test_which_kept_tokens_carry_the_loss_depends_on_the_generator_alone():
    loss = TokenToToken(keep_share=0.5)
    one, again = (loss.weights(make_view(seed=3), make_view().maskable).cross_entropy for _ in range(2))
    assert torch.equal(one, again)
    same_token, turns = torch.full((2, 16), 7), []
    for seed in range(40):
        view = make_view(seed=seed, t=0.2)
        chosen = loss.weights(replace(view, clean=same_token), view.maskable).cross_entropy > 0
        turns.append(chosen[0, 5] if bool(view.kept[0, 5]) else torch.tensor(False))
    assert 5 < int(torch.stack(turns).sum()) < 30, "the same token at the same place has its turn, and not always"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_loss_gives_finite_gradients(case):
    model = random_model(alignment="parent")
    with under_profile("FULL"):
        loss = build("loss", LOSSES, case)
    pairs = CausalPairs.collate([[(i, i - 3, 1.0) for i in range(3, 16)]] * 2)
    view = replace(make_view(t=0.5), replaced=~make_view(t=0.5).masked, pairs=pairs)
    view = right_at_the_end(model, view)  # or a random model would never be right, which is what cap is about
    step = SupervisedStep(model, {case["name"]: loss}, model.head.detach())
    outcome = step(view, teacher_hidden=torch.randn(2, 16, 32, dtype=torch.float64))
    total = outcome.total if outcome.auxiliary is None else outcome.total + outcome.auxiliary
    total.backward()
    assert total.item() > 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_every_loss_has_a_case_and_a_misspelt_one_is_refused():
    assert {case["name"] for case in CASES} == set(LOSSES)
    with pytest.raises(UnknownChoice, match="did you mean 'm2t'"):
        build("loss", LOSSES, {"name": "m2"})
    with pytest.raises(ConfigError, match="unknown key 'wieght', did you mean 'weight'"):
        build("loss", LOSSES, {"name": "m2t", "wieght": 1})


def test_masked_mean_is_the_mean_over_masked_tokens_and_nothing_without_any():
    model, view = random_model(), make_view(t=0.4)
    plain = SupervisedStep(model, {"m2t": MaskToToken(weighting="uniform")})(view).total.detach()
    mean = SupervisedStep(model, {"m2t": MaskToToken(weighting="masked_mean")})(view).total.detach()
    masked = int(view.masked.sum())
    assert float(mean) / view.clean.numel() == pytest.approx(float(plain) / masked, rel=1e-6)
    bare = replace(view, masked=torch.zeros_like(view.masked), noisy=view.clean)
    weights = MaskToToken(weighting="masked_mean").weights(bare, bare.maskable).cross_entropy
    assert torch.isfinite(weights).all() and not weights.any()


def test_t2t_means_are_over_the_wrong_and_over_the_kept_tokens():
    view = replace_tokens(make_view(length=64, t=0.3), 0.2, torch.arange(MASK), torch.Generator().manual_seed(1))
    targets = view.maskable.clone()
    targets[:, :8] = False
    weights = TokenToToken(weight=2.0, keep=0.5, keep_share=0.5, weighting="mean").weights(view, targets).cross_entropy
    size = int(targets.sum())
    assert float(weights[view.replaced].sum()) == pytest.approx(2.0 * size)
    assert float(weights[view.kept].sum()) == pytest.approx(0.5 * size)
    assert not weights[~targets].any() and not weights[view.masked].any()


@pytest.mark.parametrize(
    ("weighting", "band", "expected"),
    [("elbo", (0.0, 1.0), 2.302585), ("elbo", (0.3, 0.8), 2.233270), ("masked_mean", (0.3, 0.8), 1.209303)],
)
def test_expected_losses_of_the_toy(weighting, band, expected):
    """Two binary tokens, x = 01, exact conditionals; every mask at every t. A view without masks has no mean."""
    losses = {(0,): (1.386294, 0.0), (1,): (0.0, 1.609438), (0, 1): (0.693147, 0.916291)}
    clean, zeros = torch.tensor([[0, 1]]), torch.zeros(1, 2, dtype=torch.long)
    nodes, shares = numpy.polynomial.legendre.leggauss(20)
    total = happens = 0.0
    for node, share in zip(nodes, shares, strict=True):
        t = band[0] + (band[1] - band[0]) * (node + 1) / 2
        for masks_, loss in losses.items():
            masked = torch.tensor([[0 in masks_, 1 in masks_]])
            noisy, time = clean.masked_fill(masked, MASK), torch.full((1, 2), t, dtype=torch.float64)
            view = NoisedBatch(clean, noisy, zeros, torch.arange(2)[None], ~zeros.bool(), masked, zeros.bool(), time, 2)
            weight = MaskToToken(weighting=weighting).weights(view, view.maskable).cross_entropy
            probability = share / 2 * t ** len(masks_) * (1 - t) ** (2 - len(masks_))
            total += probability * float((weight * torch.tensor([loss])).sum())
            happens += probability
    mean = total / 2 / happens if weighting == "masked_mean" else total
    assert mean == pytest.approx(expected, abs=2e-6)
