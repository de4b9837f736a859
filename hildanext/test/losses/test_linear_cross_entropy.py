"""Head and losses in one: entropy beside cross-entropy and KL, and how much of the logits ever exists."""

import math
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import random_model
from hildanext.core.errors import ConfigError
from hildanext.losses import SupervisedStep
from hildanext.losses.confidence import ConfidenceAware
from hildanext.losses.distillation import ParentDistillation
from hildanext.losses.linear_cross_entropy import linear_cross_entropy
from hildanext.losses.mask_to_token import MaskToToken
from hildanext.losses.token_to_token import TokenToToken
from noised_examples import MASK, answers, make_view, noisy_logits, right_at_the_end

ROWS, VOCAB = 11, 20
BANNED = torch.arange(VOCAB) >= 18


def problem(seed: int = 1):
    """Hidden states and a head for which every other label is the most probable id, and weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(VOCAB, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    best = (hidden @ head.T).masked_fill(BANNED, -math.inf).argmax(-1)
    labels = torch.where(torch.arange(ROWS) % 2 == 0, best, (best + 1) % 18)
    weights = [torch.rand(ROWS, generator=generator).double() for _ in range(3)]
    return hidden, head, labels, weights


@pytest.mark.parametrize("chunk", [1, 3, 256])
@pytest.mark.parametrize("with_teacher", [False, True])
def test_chunked_entropy_and_its_gradients_equal_the_dense_ones(chunk: int, with_teacher: bool):
    hidden, head, labels, (weight, also, sharp) = problem()
    sharp[2] = 0.0
    teacher_hidden = torch.randn(ROWS, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    against = (also, teacher_hidden, head.detach()) if with_teacher else (None, None, None)
    ours = linear_cross_entropy(hidden, head, labels, weight, BANNED, *against, chunk, sharp)
    logp = (hidden @ head.T).masked_fill(BANNED, -math.inf).log_softmax(-1)
    entropy = -(logp.exp() * logp.masked_fill(BANNED, 0.0)).sum(-1)
    right = logp.argmax(-1) == labels
    assert 0 < int(right.sum()) < ROWS
    theirs = (weight * -logp.gather(1, labels[:, None])[:, 0]).sum() + (sharp * entropy)[right].sum()
    if with_teacher:
        teacher = (teacher_hidden @ head.detach().T).masked_fill(BANNED, -math.inf).log_softmax(-1)
        theirs = theirs + (also * (teacher.exp() * (teacher - logp)).masked_fill(BANNED, 0.0).sum(-1)).sum()
    assert torch.allclose(ours.total, theirs, atol=1e-10)
    assert torch.allclose(ours.entropy, entropy * (right & (sharp > 0)), atol=1e-10)
    mine, reference = (torch.autograd.grad(total * 0.7, (hidden, head)) for total in (ours.total, theirs))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(mine, reference, strict=True))


def test_the_gradient_of_the_entropy_is_the_slope():
    hidden, head, labels, (weight, _, sharp) = problem(3)

    def total(hidden, head):
        return linear_cross_entropy(hidden, head, labels, 0.0 * weight, BANNED, chunk=4, entropy_weight=sharp).total

    assert float(total(hidden, head).detach()) > 0.1
    assert torch.autograd.gradcheck(total, (hidden, head), eps=1e-6, atol=1e-7)


def test_a_prediction_without_a_doubt_has_no_entropy_and_no_gradient():
    hidden = torch.tensor([[60.0]], requires_grad=True)
    head = torch.tensor([[10.0], [-10.0], [-11.0]])
    losses = linear_cross_entropy(
        hidden, head, torch.tensor([0]), torch.zeros(1), torch.zeros(3).bool(), entropy_weight=torch.ones(1)
    )
    losses.total.backward()
    assert losses.entropy.tolist() == [0.0] and hidden.grad.tolist() == [[0.0]]


def test_cap_is_the_entropy_of_right_predictions_over_the_masked_tokens():
    model = random_model()
    view = right_at_the_end(model, make_view(length=24, t=0.6))
    outcome = SupervisedStep(model, {"cap": ConfidenceAware(weight=2.0)})(view)
    logp = noisy_logits(model, view).detach().log_softmax(-1)
    entropy = -(logp.exp() * logp).nan_to_num(0.0).sum(-1)
    right = view.masked & (logp.argmax(-1) == view.clean)
    assert 1 < int(right.sum()) < int(view.masked.sum())
    mean = 2.0 * float(entropy[right].sum()) / int(view.masked.sum())
    assert outcome.total.item() / view.clean.numel() == pytest.approx(mean, rel=1e-6)  # weights are fp32
    assert outcome.losses["cap"].item() == pytest.approx(outcome.total.item(), rel=1e-12)


def test_cap_leaves_alone_what_is_wrong_or_not_masked():
    model = random_model()
    view = right_at_the_end(model, make_view(length=24, t=0.6))
    best = noisy_logits(model, view).argmax(-1)
    last = view.position // view.block_size == 5
    wrong = replace(view, clean=torch.where(last & view.masked, (best + 1) % MASK, view.clean))
    outcome = SupervisedStep(model, {"cap": ConfidenceAware()})(wrong)
    known = (wrong.masked & (noisy_logits(model, wrong).argmax(-1) == wrong.clean)).sum()
    assert int(known) == 0 and outcome.total.item() == 0.0


def test_cap_makes_the_model_surer_of_what_it_has_right():
    """Gradient descent on CAP alone raises the probability of right predictions."""
    model = random_model()
    view = right_at_the_end(model, make_view(length=24, t=0.6))
    right = view.masked & (noisy_logits(model, view).argmax(-1) == view.clean)
    sure = [noisy_logits(model, view).softmax(-1).amax(-1)[right].mean().item()]
    step = SupervisedStep(model, {"cap": ConfidenceAware()})
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-4)
    for _ in range(4):
        optimizer.zero_grad()
        step(view).total.backward()
        optimizer.step()
        sure.append(noisy_logits(model, view).softmax(-1).amax(-1)[right].mean().item())
    assert sure == sorted(sure) and sure[-1] > sure[0] + 0.01


def test_a_negative_weight_of_cap_is_refused():
    from hildanext.core.config import validate

    with pytest.raises(ConfigError, match="weight"):
        validate(ConfidenceAware, {"weight": -1.0}, where="loss")


class LargestLogits(TorchDispatchMode):
    """Remembers the most rows of any tensor as wide as the vocabulary, in the forward and in the backward."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.rows = vocab, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.ndim > 1 and leaf.shape[-1] == self.vocab:
                self.rows = max(self.rows, leaf.numel() // self.vocab)
        return out


@pytest.mark.parametrize("layout", ["double", "response"])
@pytest.mark.parametrize("autocast", [False, True])
def test_logits_never_exceed_one_chunk(layout: str, autocast: bool):
    """A whole step (M2T, T2T, KL and CAP, two turns, backward) on 300 supervised rows, 40 at a time."""
    model = random_model("llama", dtype=torch.float32)
    view = answers([[[20, 172]], [[60, 132]]])
    view = replace(view, time=view.time.float())
    losses = {"m2t": MaskToToken(), "t2t": TokenToToken(), "kl": ParentDistillation(), "cap": ConfidenceAware()}
    step = SupervisedStep(model, losses, model.head.detach().clone(), chunk=40, layout=layout)
    teacher = torch.randn(2, 192, 32)
    # 64 ids, 32 hidden: the head transposed is as wide as the vocabulary and has 32 rows, fewer than a chunk.
    with LargestLogits(64) as seen, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        outcome = step(view, generator=torch.Generator().manual_seed(0), teacher_hidden=teacher, wants_draft=True)
        outcome.total.backward()
    assert int(view.maskable.sum()) > 7 * 40
    assert seen.rows == 40


class LivesOn(TorchDispatchMode):
    """At each new chunk's logits, how many tensors as wide as the vocabulary are still held."""

    def __init__(self, chunk: int, vocab: int) -> None:
        super().__init__()
        self.shape, self.made, self.held = (chunk, vocab), [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default and (args[0].shape[0], args[1].shape[1]) == self.shape:
            self.held.append(sum(reference() is not None for reference in self.made))
        out = function(*args, **(kwargs or {}))
        if (
            isinstance(out, torch.Tensor)
            and out.ndim == 2
            and out.shape[0] <= self.shape[0]
            and out.shape[1] == self.shape[1]
        ):
            self.made.append(weakref.ref(out))
        return out


@pytest.mark.parametrize("entropy", [False, True])
def test_nothing_of_a_chunk_lives_on_beside_the_next_one_s_logits(entropy: bool):
    hidden, head, labels, weights = problem()
    asked = {"entropy_weight": weights[1][:10]} if entropy else {}
    with LivesOn(2, VOCAB) as seen:
        linear_cross_entropy(hidden[:10], head, labels[:10], weights[0][:10], BANNED, chunk=2, **asked)
    assert seen.held == [0] * 5
