"""k1, k2 and k3: their numbers, and what they estimate, summed over a whole law."""

from typing import get_args

import pytest
import torch

from hildanext.rl.divergence import Divergence, divergence

REFERENCE = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


def policy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of each of three tokens, and what each is drawn with, as a constant."""
    logp = logits.log_softmax(-1)
    return logp, logp.exp().detach()


def leaf() -> torch.Tensor:
    return torch.tensor([0.4, -0.3, 0.8], dtype=torch.float64, requires_grad=True)


def true_kl(logits: torch.Tensor) -> torch.Tensor:
    logp = logits.log_softmax(-1)
    return (logp.exp() * (logp - REFERENCE.log())).sum()


@pytest.mark.parametrize(("kind", "value"), [("k1", 0.8), ("k2", 0.32), ("k3", 0.249329)])
def test_v6_at_a_difference_of_0_8(kind, value):
    difference = torch.tensor([[0.8], [0.0]], dtype=torch.float64)
    assert divergence(kind, difference).tolist() == [[pytest.approx(value, abs=5e-7)], [0.0]]


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_mean_of_k1_and_of_k3_is_the_kl(kind):
    logp, p = policy(leaf())
    mean = (p * divergence(kind, logp - REFERENCE.log())).sum()
    assert mean.item() == pytest.approx(true_kl(leaf()).item(), abs=1e-12)


def test_only_k2_has_the_gradient_of_the_kl_for_samples_of_the_policy_and_k1_has_none():
    wanted = torch.autograd.grad(true_kl(logits := leaf()), logits)[0]
    found = {}
    for kind in get_args(Divergence):
        logp, p = policy(logits := leaf())
        found[kind] = torch.autograd.grad((p * divergence(kind, logp - REFERENCE.log())).sum(), logits)[0]
    assert torch.allclose(found["k2"], wanted, atol=1e-12)
    assert torch.allclose(found["k1"], torch.zeros(3).double(), atol=1e-12)
    assert not torch.allclose(found["k3"], wanted, atol=1e-3)


def test_k3_is_exact_where_the_policies_hardly_differ():
    """exp(-d) - 1 + d taken literally loses every digit of d^2 / 2 in fp32."""
    assert float(divergence("k3", torch.tensor(1e-3))) == pytest.approx(5e-7, rel=1e-2)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_no_difference_has_no_gradient(kind):
    difference = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    divergence(kind, difference).sum().backward()
    assert difference.grad.tolist() == [0.0, 0.0, 0.0]
