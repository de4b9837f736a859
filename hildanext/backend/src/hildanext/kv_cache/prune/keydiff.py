"""Keys like all others go first."""

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from hildanext.core.config import config
from hildanext.kv_cache.prune.base import Prune, Slots


@config
class KeyDiff(Prune):
    """Keeps the keys that are least like the head's mean direction (cosine similarity).

    Paper: KeyDiff, arXiv:2504.15364.
    Differs: the mean is over what is kept, at every commit, and the first and newest slots always stay.
    """

    def scores(self, slots: Slots) -> Float[Tensor, "kv_heads slots"]:
        directions = normalize(slots.keys, dim=-1)
        if slots.live is not None:
            directions = directions * slots.live[..., None]
        held = directions.shape[1] if slots.live is None else slots.live.sum(-1)[:, None, None]
        return -cosine_similarity(slots.keys, directions.sum(1, keepdim=True) / held, dim=-1)
