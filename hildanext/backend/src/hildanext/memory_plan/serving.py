"""The peak of decoding: the weights, the block cache, and one forward over a chunk of the prompt or a block."""

from dataclasses import dataclass

from hildanext.kv_cache.prune import Prune
from hildanext.kv_cache.prune.pruned_cache import slots_for
from hildanext.memory_plan.architecture import Architecture
from hildanext.memory_plan.layer import FLOAT
from hildanext.memory_plan.step import PARTS, Peak, weights_bytes
from hildanext.models.attention import PREFILL_TOKENS


@dataclass(frozen=True)
class Serving:
    """A batch of documents of up to `context` tokens, in weights and activations of `width` bytes."""

    shape: Architecture
    batch: int
    context: int
    block: int
    width: int
    beside: Architecture | None = None
    """The parent that writes in the same process."""
    prune: Prune | None = None
    """What caches drop."""

    @property
    def capacity(self) -> int:
        return -(-self.context // self.block) * self.block

    @property
    def slots(self) -> int:
        """That a cache has; a document may be nearly all prompt."""
        return slots_for(self.prune, self.capacity, self.capacity, self.block)


def serving_peak(case: Serving, framework: int) -> Peak:
    """The peak in bytes, at the longest prompt or in the last block, whichever is larger."""
    shape = case.shape
    cache = 2 * shape.layers * case.batch * (case.slots + 1) * shape.key * case.width
    hidden = case.batch * (case.capacity // case.block + 1) * shape.hidden * case.width
    weights = weights_bytes(shape, False, case.width)
    if case.beside is not None:
        weights += weights_bytes(case.beside, False, case.width)
        cache += 2 * case.beside.layers * case.batch * case.capacity * case.beside.key * case.width
    standing = {
        "weights": weights,
        "cache": cache + hidden,
        "framework": framework,
    }
    moments = {
        "prefill": _forward(case, min(PREFILL_TOKENS, case.capacity), with_logits=False),
        "block": _forward(case, 2 * case.block, with_logits=True),  # the finished block is fed with the next one
    }
    parts = {
        name: {part: standing.get(part, 0) + peak.get(part, 0) for part in (*PARTS, "cache")}
        for name, peak in moments.items()
    }
    totals = {name: sum(sizes.values()) for name, sizes in parts.items()}
    moment = max(totals, key=lambda name: totals[name])
    return Peak(parts[moment], moment, totals)


def _forward(case: Serving, fed: int, with_logits: bool) -> dict[str, int]:
    """One layer at work over the cache, and fp32 logits with two more of their size for probabilities."""
    shape, n = case.shape, case.batch * fed
    stream = n * shape.hidden * (FLOAT + 3 * case.width)
    wide = max(3 * shape.inner, 3 * shape.query + 2 * shape.key)
    mask = case.batch * shape.heads // shape.kv_heads * fed * case.capacity * case.width
    scores = case.batch * shape.heads * fed * case.capacity * FLOAT if case.width == FLOAT else 0
    parts = {"activations": stream + n * wide * case.width, "attention": mask + min(scores, mask * 2)}
    if with_logits:
        parts["logits"] = case.batch * case.block * shape.vocab * (case.width + 3 * FLOAT)
    return parts
