"""Which copies of a view's tokens a forward is given, and that the choice changes no number."""

from dataclasses import replace

import pytest
import torch

from conftest import random_model
from hildanext import masks
from hildanext.core.errors import NumericsError
from hildanext.corruption.input_layout import InputLayout, build_layout, choose_layout, layout_of
from hildanext.diffusion import (
    CausalPairs,
    NoisedBatch,
    next_turn,
)
from hildanext.losses import SupervisedStep, TokenLoss, Weights
from hildanext.losses.autoregressive import Autoregressive
from hildanext.losses.c2dlm import CausalAttention
from hildanext.losses.confidence import ConfidenceAware
from hildanext.losses.distillation import ParentDistillation
from hildanext.losses.mask_to_token import MaskToToken
from hildanext.losses.objective import attention_for
from hildanext.losses.representation import RepresentationAlignment
from hildanext.losses.token_to_token import TokenToToken
from hildanext.models.attention.blockwise import DoubledAttention
from hildanext.models.attention.dense import MaskedAttention
from noised_examples import MASK, Row, answers, right_at_the_end

ROWS: dict[str, list[Row]] = {
    "one answer": [[[9, 7]], [[5, 11]]],
    "two turns": [[[6, 2, 9, 3]], [[13, 7]]],
    "packed": [[[5, 3], [4, 4]], [[9, 7]]],
    "off the grid": [[[5, 2], [7, 3]], [[9, 6, 3, 1]]],
    "one row teaches nothing": [[[16]], [[10, 6]]],
    "padding": [[[5, 3]], [[6, 2], [3, 1]]],
    "no prompt": [[[0, 8], [0, 8]], [[8, 8]]],
    "nothing to learn": [[[12]], [[7]]],
}


def with_pairs(view: NoisedBatch) -> NoisedBatch:
    """Each answer token an effect of the token three before it."""
    rows = [[(token, token - 3, 1.0) for token in row.nonzero()[:, 0].tolist() if token >= 3] for row in view.maskable]
    return replace(view, pairs=CausalPairs.collate(rows))


def every_loss(alignment: str) -> dict[str, TokenLoss]:
    losses = {
        "m2t": MaskToToken(),
        "t2t": TokenToToken(keep_share=1.0),
        "kl": ParentDistillation(),
        "align": RepresentationAlignment(),
        "cap": ConfidenceAware(),
        "c2dlm": CausalAttention(apply="both", loss="mass", max_rows=2),
    }
    return losses if alignment == "block" else {**losses, "ar": Autoregressive()}


def outcome_of(model, losses, view: NoisedBatch, layout: str, **how):
    """Everything that a step gives for a view, and the gradients of all parameters."""
    model.zero_grad()
    teacher = torch.randn(*view.clean.shape, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    step = SupervisedStep(model, losses, model.head.detach() * 0.9, chunk=5, layout=layout)
    outcome = step(view, generator=torch.Generator().manual_seed(5), teacher_hidden=teacher, **how)
    total = outcome.total if outcome.auxiliary is None else outcome.total + outcome.auxiliary
    total.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return outcome, gradients


def test_predictions_are_read_where_the_shift_says():
    position = torch.arange(6)[None]
    doubled, single = InputLayout(position, position, 6), InputLayout(position, position[:, :0], 6)
    assert doubled.prediction_index(position, 3, "none").tolist() == [[0, 1, 2, 3, 4, 5]]
    # left: inside a block the noisy state before; a block's first token reads the clean half (6 + index - 1)
    assert doubled.prediction_index(position, 3, "left").tolist() == [[6, 0, 1, 8, 3, 4]]
    assert single.prediction_index(position, 6, "left").tolist() == [[0, 0, 1, 2, 3, 4]]
    assert InputLayout(position[:, :0], position, 6).prediction_index(position, 1, "left").tolist() == [
        [0, 0, 1, 2, 3, 4]
    ]
    assert doubled.clean_prediction_index(position).tolist() == [[6, 6, 7, 8, 9, 10]]


@pytest.mark.parametrize(
    ("block", "shift", "layout"),
    [
        (1, "left", "clean"),
        (1, "none", "double"),
        (4, "left", "double"),
        (16, "none", "single"),
        (16, "left", "single"),
    ],
)
def test_input_is_doubled_unless_one_half_is_never_read(block: int, shift: str, layout: str):
    assert layout_of(block, 16, shift) == layout
    assert layout_of(block, 16, shift, reads_clean=True) == ("double" if layout == "single" else layout)


def test_a_response_is_doubled_and_its_prompt_is_not():
    """Blocks of 4; the prompt's first block has no noisy copy, the border block has, the last block no clean one."""
    view = answers([[[5, 7]], [[9, 3]]])
    fed = build_layout(view, "response")
    assert fed.noisy[0].tolist() == [4, 5, 6, 7, 8, 9, 10, 11] and fed.clean[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    # The second row needs the noisy block 8..11 and the clean 0..7; it is filled up to the first row's count.
    assert fed.noisy[1].tolist() == [0, 1, 2, 3, 8, 9, 10, 11] and fed.clean[1].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert torch.equal(fed.rows(view).position[0], torch.tensor([*range(4, 12), *range(8)]))
    whole = build_layout(view, "response", reads_clean=True)
    assert torch.equal(whole.noisy, fed.noisy) and whole.clean[0].tolist() == list(range(12))  # P + 2R


def test_every_turn_of_a_dialogue_is_doubled_and_padding_is_not_fed():
    view = answers([[[4, 4, 8, 4]], [[4, 8, 2, 2]]])  # rows of 20, the second with 4 of padding
    fed = build_layout(view, "response")
    assert fed.noisy[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19], "filled up by its first prompt"
    assert fed.noisy[1].tolist() == [*range(4, 16)] and fed.clean[1].tolist() == [*range(16)]
    alone = answers([[[3, 5], [4, 2]]])
    assert build_layout(alone, "response").clean.tolist() == [[0, 1, 2, 3, 8, 9, 10, 11]]


def test_auto_leaves_columns_out_where_that_is_worth_while():
    short, long = answers([[[12, 4]]]), answers([[[0, 4]]] * 2 + [[[0, 40]]])
    assert choose_layout(short, "none").token.shape[1] == 4 + 12
    assert choose_layout(short, "none", choice="double").token.shape[1] == 32
    assert (
        choose_layout(long, "none").token.shape[1] == 80
        and choose_layout(long, "none", choice="response").token.shape[1] == 76
    )
    assert choose_layout(answers([[[12, 4]]], block=16), "none", choice="response").token.shape[1] == 16, (
        "a single copy"
    )
    assert choose_layout(answers([[[12, 4]]], block=1), "left", choice="response").token.shape[1] == 16, (
        "clean copies alone"
    )


@pytest.mark.parametrize("block", [4, 1])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_leaving_columns_out_changes_no_loss_and_no_gradient(alignment, rows, block):
    """fp64, to 1e-10: every loss, the draft of the next turn, the accuracy, under mask noise."""
    model = random_model("qwen3" if alignment == "block" else "llama", alignment)
    view = right_at_the_end(model, with_pairs(answers(ROWS[rows], block)))
    losses = every_loss(alignment)
    double, expected = outcome_of(model, losses, view, "double", mask_noise=0.1, wants_draft=True)
    some, gradients = outcome_of(model, losses, view, "response", mask_noise=0.1, wants_draft=True)
    if rows == "two turns":
        assert all(loss > 0 for loss in (double.losses | double.averages).values()), "every loss has a say"
    assert some.total.item() == pytest.approx(double.total.item(), rel=1e-10, abs=1e-10)
    for name, value in (double.losses | double.averages).items():
        assert (some.losses | some.averages)[name].item() == pytest.approx(value.item(), rel=1e-10, abs=1e-10), name
    assert torch.equal(some.correct, double.correct) and torch.equal(some.masked, double.masked)
    assert (some.draft is None) == (double.draft is None)
    if double.draft is not None:
        assert torch.equal(some.draft, double.draft)
    assert set(gradients) == set(expected)
    for name, gradient in expected.items():
        assert torch.allclose(gradients[name], gradient, atol=1e-10, rtol=1e-10), name


def test_what_is_left_out_is_what_makes_the_forward_shorter():
    """The comparison above is between different inputs, where there is a prompt."""
    view = answers(ROWS["one answer"])
    layouts = [("double", False), ("response", True), ("response", False)]
    counts = [choose_layout(view, "none", reads_clean, layout).token.shape[1] for layout, reads_clean in layouts]
    assert counts == [32, 12 + 16, 12 + 12]


@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_a_later_turn_is_fed_alike(alignment):
    model = random_model(alignment=alignment)
    view = answers(ROWS["two turns"])
    losses = {"m2t": MaskToToken(weighting="masked_mean"), "t2t": TokenToToken(keep_share=1.0)}
    drafts = [outcome_of(model, losses, view, layout, wants_draft=True)[0].draft for layout in ("double", "response")]
    later = [next_turn(view, draft, MASK) for draft in drafts]
    assert bool(later[0].replaced.any())
    (one, first), (other, second) = (
        outcome_of(model, losses, turn, layout) for turn, layout in zip(later, ("double", "response"), strict=True)
    )
    assert one.total.item() == pytest.approx(other.total.item(), rel=1e-10)
    assert all(torch.allclose(first[name], second[name], atol=1e-10) for name in first)


@pytest.mark.parametrize("clean_mask", ["block_causal", "token_causal"])
@pytest.mark.parametrize("rows", ["one answer", "two turns", "packed", "one row teaches nothing"])
def test_attention_by_blocks_equals_the_dense_mask_over_chosen_columns(rows, clean_mask):
    model = random_model("llama")
    view = answers(ROWS[rows])
    fed = build_layout(view, "response")
    blocks = attention_for(view, fed, clean_mask, model.head)
    assert isinstance(blocks, DoubledAttention)
    where = fed.rows(view)
    dense = MaskedAttention(masks.among(where, 4, clean_mask))
    a, b = (model(model.embed(fed.tokens(view)), where.position, context) for context in (blocks, dense))
    real = where.document >= 0
    assert torch.allclose(a[real], b[real], atol=1e-10)


def test_columns_off_the_grid_take_the_dense_mask():
    view = answers(ROWS["off the grid"])
    assert isinstance(
        attention_for(view, build_layout(view, "response"), "block_causal", random_model().head), MaskedAttention
    )


def test_the_mask_of_chosen_columns_is_that_part_of_the_doubled_mask():
    for rows in ROWS.values():
        view = answers(rows)
        whole = masks.doubled(view.document, view.position, 4)
        fed = build_layout(view, "response")
        column = torch.cat([fed.noisy, fed.clean + fed.seq], -1)
        part = torch.stack([mask[at][:, at] for mask, at in zip(whole, column, strict=True)])
        assert torch.equal(masks.among(fed.rows(view), 4), part)


def test_a_loss_that_reads_what_is_not_fed_is_an_error():
    class Prompt(TokenLoss):
        def weights(self, view, targets):
            return Weights(cross_entropy=(~view.maskable).double())

    view = answers([[[12, 4]]])
    with pytest.raises(NumericsError, match="was not fed"):
        SupervisedStep(random_model(), {"prompt": Prompt()})(view)
    SupervisedStep(random_model(), {"prompt": Prompt()}, layout="double")(view)
