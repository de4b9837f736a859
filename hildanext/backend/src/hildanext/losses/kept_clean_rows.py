"""What a frozen parent made of the rows of a batch, kept for the next time that the data is read."""

import torch
from jaxtyping import Float
from torch import Tensor

from hildanext.diffusion import NoisedBatch
from hildanext.masks import clean_only
from hildanext.models.attention.kept import KeepingAttention
from hildanext.models.drafter import Drafter

MIB = 2**20

States = tuple[Float[Tensor, "batch seq hidden"], Float[Tensor, "batch seq hidden"], KeepingAttention]


class KeptCleanRows:
    """Final states of clean rows, their states where masks enter, and the keys and values that masks attend to.

    The first batches are kept, up to `mib` of host memory, and no others: rows come round once in an epoch, so that to
    put later ones in the place of earlier ones would keep none until it is asked for.
    """

    def __init__(self, mib: int) -> None:
        self.left = mib * MIB
        self._kept: dict[tuple[bytes, bytes, bytes], list[Tensor]] = {}

    def __call__(self, model: Drafter, view: NoisedBatch, sent: NoisedBatch) -> States:
        """Of the rows of `view`, which is on the host; `sent` is the same on the model's device."""
        attention = KeepingAttention(clean_only(sent.document, sent.position, 1, "token_causal"), model.enter)
        layers = range(model.enter, len(model.causal_lm.model.layers))
        key = _key(view) if self.left > 0 or self._kept else None
        found = self._kept.get(key) if key is not None else None
        if found is not None:
            final, entering, *rest = (part.to(model.device, non_blocking=True) for part in found)
            attention.keys = dict(zip(layers, rest[::2], strict=True))
            attention.values = dict(zip(layers, rest[1::2], strict=True))
            return final, entering, attention
        with torch.no_grad():
            final, entering = model.clean(sent.clean, sent.position, attention)
        parts = [final, entering]
        for layer in layers:
            parts += [attention.keys[layer], attention.values[layer]]
        size = sum(part.numel() * part.element_size() for part in parts)
        if key is not None and size <= self.left:
            self.left -= size
            self._kept[key] = [part.contiguous().cpu() for part in parts]
        return final, entering, attention


def _key(view: NoisedBatch) -> tuple[bytes, bytes, bytes]:
    clean, document, position = (part.numpy().tobytes() for part in (view.clean, view.document, view.position))
    return clean, document, position
