"""The bound on held-out rows: what it hides, what it counts, and data that has nothing to count."""

from pathlib import Path

import pytest
import torch

from conftest import random_model
from hildanext.ar import Parent
from hildanext.core.errors import DataError
from hildanext.data.batch import Batch
from hildanext.datasets import PackedDataset, PrepareConfig, prepare
from hildanext.diffusion import NoisedBatch
from hildanext.likelihood.masked_losses import MaskedLosses, masked_losses
from hildanext.losses import SupervisedStep
from hildanext.losses.mask_to_token import MaskToToken
from hildanext.models import DiffusionModel
from hildanext.trainer.validation import EditCheck, Validation, first_batches
from small_models import small_tokenizer

EOS = 1


def rows_of(documents: list[list[int]], folder: Path, length: int = 16, block: int | None = 4) -> PackedDataset:
    settings = PrepareConfig(source={"name": "list"}, out=str(folder), add_bos=False, add_eos=False)
    prepare(settings, small_tokenizer(), documents=documents)
    return PackedDataset(folder, length, "documents", block)


def held_out(dataset: PackedDataset, rows: int = 8) -> list[Batch]:
    return first_batches(dataset, rows, 2)


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[NoisedBatch]:
    """The views that a validation scores."""
    views: list[NoisedBatch] = []

    def noted(model: DiffusionModel, view: NoisedBatch, chunk: int) -> MaskedLosses:
        views.append(view)
        return masked_losses(model, view, chunk)

    monkeypatch.setattr("hildanext.likelihood.base.masked_losses", noted)
    return views


def test_only_predictable_tokens_are_hidden(tmp_path: Path, scored: list[NoisedBatch]):
    """Documents without BOS: their first token is a given under the left shift, not a mask that nobody predicts."""
    dataset = rows_of([[5, 6, 7, 8, 9]] * 40, tmp_path)
    model = random_model(alignment="parent")
    Validation(held_out(dataset), dataset.pad_id, model.card)(SupervisedStep(model, {"m2t": MaskToToken()}), 1)
    assert len(scored) == 4 and sum(int(view.masked.sum()) for view in scored) > 20
    for view in scored:
        assert not bool(view.masked[view.position == 0].any())
        assert bool((view.noisy[view.position == 0] != model.card.mask_id).all())


def test_at_block_size_one_it_is_the_parent_s_own_likelihood_of_the_real_tokens(tmp_path: Path):
    dataset = rows_of([[5, 6, 7, EOS], [8, 9, 10, 11, EOS], [12, 13]] * 5, tmp_path, block=None)
    model = random_model(alignment="parent", block_size=1)
    metrics = Validation(held_out(dataset), dataset.pad_id, model.card)(
        SupervisedStep(model, {"m2t": MaskToToken()}), 1
    )
    parent, total, count = Parent(model.causal_lm, None, model.banned), 0.0, 0
    for batch in held_out(dataset):
        nll = parent.token_nll(batch.tokens, batch.document, batch.position)
        total, count = total + float(nll.sum()), count + int(((batch.position > 0) & (batch.document >= 0)).sum())
    assert metrics["bound"] == pytest.approx(total / count, rel=1e-6)


def test_padding_is_summed_and_not_counted(tmp_path: Path, scored: list[NoisedBatch]):
    """Five tokens and EOS in blocks of four: two places of padding a document, whose loss belongs to the bound."""
    dataset = rows_of([[5, 6, 7, 8, 9, EOS]] * 2, tmp_path)
    model = random_model(alignment="parent")
    step = SupervisedStep(model, {"m2t": MaskToToken()})
    measured = Validation(held_out(dataset), dataset.pad_id, model.card)(step, 1)
    (view,) = scored
    with torch.no_grad():
        outcome = step.eval()(view)
    assert bool(view.masked[:, 6:8].any()), "else this says nothing of padding"
    assert measured["bound"] == pytest.approx(float(outcome.total) / (2 * 5), rel=1e-6)


def test_documents_of_one_token_are_an_error_that_says_what_to_do(tmp_path: Path):
    dataset = rows_of([[5]] * 20, tmp_path, block=None)
    with pytest.raises(DataError, match="no token to predict in 2 rows.*longer documents"):
        Validation(held_out(dataset), dataset.pad_id, random_model(alignment="parent").card)


def test_masked_accuracy_is_the_share_of_masks_filled_right(tmp_path: Path, scored: list[NoisedBatch]):
    dataset = rows_of([[5, 6, 7, 8, 9, EOS]] * 20, tmp_path)
    model = random_model()
    scorer = SupervisedStep(model, {"m2t": MaskToToken()})
    metrics = Validation(held_out(dataset), dataset.pad_id, model.card)(scorer, 1)
    outcomes = [scorer(view) for view in scored]
    right, masked = (sum(int(getattr(o, name).sum()) for o in outcomes) for name in ("correct", "masked"))
    assert masked and metrics["masked_accuracy"] == right / masked


class Oracle(SupervisedStep):
    """Drafts the truth at every second place and one fixed token elsewhere."""

    def forward(self, view: NoisedBatch, *rest: object, **more: object) -> object:
        truth = torch.arange(view.clean.shape[1]) % 2 == 0
        outcome = super().forward(view, *rest, **more)
        return outcome.__class__(
            outcome.total, outcome.losses, outcome.correct, outcome.masked, torch.where(truth, view.clean, 60)
        )


def test_edits_are_counted_at_wrong_and_at_right_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dataset = rows_of([[5, 6, 7, 8, 9, 10, 11, EOS]] * 40, tmp_path)
    model, real = random_model(), torch.arange(3, 60)
    check = EditCheck(held_out(dataset, 32), model.card, real, rate=0.3)
    assert all(not view.masked.any() and view.replaced.any() for view in check.views)
    step = SupervisedStep(model, {"m2t": MaskToToken()})
    free = check(step, 1)
    assert free == check(step, 2) and 0 <= free["corrected"] <= 1 and 0 <= free["kept"] <= 1
    monkeypatch.setattr("hildanext.trainer.validation.SupervisedStep", Oracle)
    metrics = check(step, 1)
    even = torch.arange(16) % 2 == 0
    wrong = sum(int(view.replaced.sum()) for view in check.views)
    assert metrics["corrected"] == sum(int((view.replaced & even).sum()) for view in check.views) / wrong


@pytest.mark.parametrize("make", ["bound", "edits"])
def test_hidden_tokens_are_shown_as_masks(tmp_path: Path, scored: list[NoisedBatch], make: str):
    """The next question behind an answer in its block: inference writes the block without it."""
    batch = rows_of([[5, 6, 7, 8, 9, 10, 11, EOS]] * 4, tmp_path).batch([0, 1])
    hidden = torch.zeros_like(batch.maskable)
    hidden[:, 6:8] = True
    batch = Batch(batch.tokens, batch.document, batch.position, batch.maskable & ~hidden, hidden)
    model = random_model()
    step = SupervisedStep(model, {"m2t": MaskToToken()})
    if make == "bound":
        Validation([batch], EOS, model.card)(step, 1)
        views = scored
    else:
        views = EditCheck([batch], model.card, torch.arange(3, 60), 0.5).views
    for view in views:
        assert (view.noisy[hidden] == model.card.mask_id).all() and not (view.masked & hidden).any()
        assert torch.equal(view.clean, batch.tokens)
