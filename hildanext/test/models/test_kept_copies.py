"""Copies of frozen parameters are made once, and never stand for weights that have changed."""

import pytest
import torch

from hildanext.models.drafter import Drafter
from hildanext.models.gated_lora import GatedLinear, GatedLoraConfig, gated_layers
from hildanext.models.kept_copies import KeptCopies
from hildanext.models.sampler_head import SamplerHead
from small_models import small_causal


def test_a_frozen_parameters_copy_is_made_once_until_it_changes() -> None:
    kept, matrix, made = KeptCopies(), torch.ones(2, 2), []

    def copy() -> torch.Tensor:
        made.append(1)
        return matrix * 2

    assert kept("double", copy, matrix) is kept("double", copy, matrix) and len(made) == 1
    matrix.mul_(3)
    assert torch.equal(kept("double", copy, matrix), torch.full((2, 2), 6.0)) and len(made) == 2


@pytest.mark.parametrize("fused", [False, True])
def test_what_an_optimiser_has_changed_is_seen_by_the_next_forward_without_gradient(fused: bool) -> None:
    """Fused optimisers do not count what they do as a change of the tensor."""
    drafter = Drafter(small_causal(), GatedLoraConfig(rank=2), 2, sampler=3)
    layers = [layer for _, layer in gated_layers(drafter.causal_lm)]
    assert drafter.sampler is not None
    layer, sampler = layers[0], drafter.sampler
    with torch.no_grad():
        for parameter in (layer.lora_B, sampler.up):
            parameter.normal_()
    rows = torch.randn(1, 3, layer.lora_A.shape[1])
    before = _said(layer, sampler, drafter, rows)
    optimiser = torch.optim.AdamW([*drafter.sampler.parameters(), layer.lora_A], lr=0.5, fused=fused)
    (sampler(rows, rows).sum() + layer.lora_A.square().sum()).backward()
    optimiser.step()
    for one, other in zip(before, _said(layer, sampler, drafter, rows), strict=True):
        assert not torch.allclose(one, other)


@torch.no_grad()
def _said(
    layer: GatedLinear, sampler: SamplerHead, drafter: Drafter, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    with drafter.gate.after(0):
        adapted = layer(rows)
    return adapted, sampler(rows.bfloat16(), rows.bfloat16()).float()
