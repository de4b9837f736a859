"""The oldest go first."""

import torch
from jaxtyping import Float
from torch import Tensor

from hildanext.core.config import config
from hildanext.kv_cache.prune.base import Prune, Slots


@config
class Streaming(Prune):
    """Keeps the first four slots and the newest ones.

    Paper: StreamingLLM, arXiv:2309.17453.
    Differs: positions stay those of the document, since keys are kept behind the rotary embedding, and the window grows
    with the document (`ratio`).
    """

    def scores(self, slots: Slots) -> Float[Tensor, "kv_heads slots"]:
        heads, count, _ = slots.keys.shape
        return torch.arange(count, dtype=slots.keys.dtype, device=slots.keys.device).expand(heads, count)
