"""What its own block looks at least goes first."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from hildanext.core.config import config
from hildanext.kv_cache.prune.base import Prune, Slots


@config
class NonCausal(Prune):
    """Keeps the keys that receive the most attention from the clean tokens of their own block, without causal order.

    Paper: the non-causal attention scores of Compactor, arXiv:2507.08143.
    Differs: chunks are blocks, so that scores do not depend on the pieces in which a prompt is fed; there are no
    leverage scores beside them. A commit needs the queries, so that every block is committed by clean rows.
    """

    wants_queries: ClassVar[bool] = True

    def scores(self, slots: Slots) -> Float[Tensor, "kv_heads slots"]:
        assert slots.attention is not None, "the forward that committed these kept no attention"
        return slots.attention
