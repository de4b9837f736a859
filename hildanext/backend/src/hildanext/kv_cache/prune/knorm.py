"""Long keys go first."""

from jaxtyping import Float
from torch import Tensor

from hildanext.core.config import config
from hildanext.kv_cache.prune.base import Prune, Slots


@config
class KNorm(Prune):
    """Keeps the keys of the smallest L2 norm.

    Paper: "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv:2406.11430.
    Differs: no layer is spared, and the first and newest slots always stay.
    """

    def scores(self, slots: Slots) -> Float[Tensor, "kv_heads slots"]:
        return -slots.keys.norm(dim=-1)
