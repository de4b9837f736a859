"""What weights must be before a model made of them is used: numbers, and tied only where they are."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from hildanext.core.errors import ModelError

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@torch.no_grad()
def check_finite(model: nn.Module, source: object) -> None:
    """Raise `ModelError` naming the first weight that holds NaN or infinity.

    The least and the greatest entry tell it of a whole tensor in one pass, and the host waits once for all of them.
    """
    weights = [(name, part) for name, part in model.named_parameters() if part.is_floating_point() and part.numel()]
    if not weights:
        return
    here = weights[0][1].device
    ends = torch.stack([torch.stack(part.aminmax()).float().to(here) for _, part in weights])
    for (name, part), good in zip(weights, ends.isfinite().all(-1).tolist(), strict=True):
        if not good:
            raise ModelError(
                f"{name} of {str(source)!r} holds {int((~part.isfinite()).sum())} values that are NaN or infinite",
                "the model is broken: copy it again, or take another checkpoint",
            )


def heads_differ(files: Sequence[Path]) -> bool:
    """Whether safetensors files hold a head that is not the embedding, whatever their configuration calls tied."""
    found: dict[str, torch.Tensor] = {}
    for path in files:
        with safe_open(str(path), framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in {EMBEDDING, HEAD} & set(file.keys())}
    return len(found) == 2 and not torch.equal(found[EMBEDDING], found[HEAD])
