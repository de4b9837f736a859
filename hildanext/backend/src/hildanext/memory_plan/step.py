"""The peak of a training step, part by part: what lies there all the time, and what each moment adds.

The moments are those at which something large exists: the loss over the vocabulary, the beginning and the end of the
backward pass, and the optimiser's step. The peak is the largest of them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from hildanext.memory_plan.architecture import Architecture
from hildanext.memory_plan.layer import (
    FLOAT,
    Feed,
    Learning,
    attention_backward,
    attention_forward,
    kept_after,
    kept_attention,
    kept_before,
    kept_casts,
)
from hildanext.models.attention.kept import TOGETHER

NF4_BYTES = 0.5 + 1 / 64 + FLOAT / 64 / 256
"""Bytes of a weight in 4 bits with doubly quantised scales."""
EIGHT_BIT = 2 + 2 * FLOAT / 256
"""Bytes of 8-bit AdamW states for a weight, scales included."""

PARTS = (
    "weights", "gradients", "optimizer", "teacher", "reference", "activations", "attention", "copies", "logits",
    "framework",
)  # fmt: skip


@dataclass(frozen=True)
class RolloutCase:
    """What an alignment has beside its step: answers that are written, and what the step needs of them."""

    slots: int
    """Answers that are written together."""
    read: int
    """Positions of each whose logits a forward makes."""
    filled: int
    """Of these, those that it fills at most."""
    kept: int
    """Tokens whose keys and values are kept, of answers that are being written and of those that have ended."""
    cache_bytes: int | None
    """The most that these may take."""
    context: int
    """Tokens of a prompt and its answer."""
    graphs: int
    """Forwards of a micro-batch whose graphs live at once: the looks of an objective that is no sum over them."""
    reference: bool
    """Whether the KL needs a reference: without adapters a frozen copy."""
    arrays: int
    """Bytes of a round's arrays, on the host."""


@dataclass(frozen=True)
class Case:
    """A training step to be planned."""

    shape: Architecture
    feed: Feed
    how: Learning
    chunk: int
    """Rows of logits at once."""
    supervised: int
    """Tokens of the batch whose prediction may count, at most."""
    teacher: Literal["none", "own", "copy"]
    """The parent as teacher: none, the same weights with the adapters off, or a second copy."""
    starts_at_teacher: bool = True
    """Whether the weights under the adapters are that parent (see `SftConfig.starts_at_teacher`)."""
    eight_bit: bool = False
    recompute: bool = False
    resting: bool = False
    """Optimiser states lie elsewhere between steps."""
    streams: int = 1
    """Readings that a loss speaks about: the noisy one, and the clean one where an autoregressive loss is on."""
    several: bool = False
    """More than one backward pass in a step, so that gradients exist during the later ones."""
    on_cpu: bool = False
    frozen: int = FLOAT
    """Bytes of a number of the weights that lie there."""
    kept: int = 0
    """Bytes of keys, values and states that are there before the forward: of clean rows that run without gradients."""
    reference: Architecture | None = None
    """A frozen model beside it that residual inputs are read from; None: none, or the weights under the adapters."""
    own_reference: bool = False
    """Whether that is a copy of the start."""
    rollouts: RolloutCase | None = None
    """Of an alignment; see `memory_plan.rl`."""

    @property
    def learning(self) -> int:
        """Weights that learn."""
        shape, how = self.shape, self.how
        return shape.parameters if how.rank is None else shape.adapters(how.rank, how.targets)

    @property
    def has_frozen_head(self) -> bool:
        return self.how.rank is not None


@dataclass(frozen=True)
class Peak:
    """Bytes by part at the largest moment, and the total of every moment."""

    parts: dict[str, int]
    moment: str
    moments: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def training_peak(case: Case, framework: int) -> Peak:
    """The peak in bytes; `framework` is what the libraries take for themselves."""
    return peak_of(training_moments(case, framework))


def peak_of(moments: Mapping[str, dict[str, int]]) -> Peak:
    """The largest of some moments, each its bytes by part."""
    totals = {name: sum(parts.values()) for name, parts in moments.items()}
    moment = max(totals, key=lambda name: totals[name])
    return Peak(moments[moment], moment, totals)


def training_moments(case: Case, framework: int) -> dict[str, dict[str, int]]:
    """Bytes by part at each moment of a step at which something large exists."""
    standing = standing_parts(case)
    moments: dict[str, dict[str, int]] = {}
    for name, parts in (
        *((("forward", kept_parts(case, case.shape.layers)),) if case.kept else ()),
        ("loss", _at_loss(case)),
        ("backward begins", _backward(case, first=True)),
        ("backward ends", _backward(case, first=False)),
        ("step", _at_step(case)),
    ):
        moments[name] = {part: standing.get(part, 0) + parts.get(part, 0) for part in PARTS}
        moments[name]["framework"] += framework
        if name != "forward" and not case.recompute:  # nobody will compute a layer again with what was kept
            moments[name]["attention"] -= case.kept
        if case.resting and name != "step":
            moments[name]["optimizer"] = 0
    return moments


def weights_bytes(shape: Architecture, packed: bool, byte: int = FLOAT) -> int:
    """Of a model whose linear layers are in 4 bits or all in `byte` bytes."""
    rest = shape.parameters - shape.matrices
    return int(shape.matrices * (NF4_BYTES if packed else byte) + rest * byte)


def _largest(moments: Iterable[dict[str, int]]) -> dict[str, int]:
    return max(moments, key=lambda parts: sum(parts.values()))


def standing_parts(case: Case) -> dict[str, int]:
    """What lies there through the whole step."""
    shape, how = case.shape, case.how
    weights = weights_bytes(shape, how.packed, case.frozen)
    if how.rank is not None:
        weights += case.learning * FLOAT
    states = int(case.learning * (EIGHT_BIT if case.eight_bit else 2 * FLOAT))
    teacher = weights_bytes(shape, False, how.narrow) if case.teacher == "copy" else 0
    reference = 0 if case.reference is None else weights_bytes(case.reference, False, how.narrow)
    return {
        "weights": weights, "optimizer": states, "teacher": teacher, "reference": reference, "attention": case.kept
    }  # fmt: skip


def kept_parts(case: Case, layers: int) -> dict[str, int]:
    """What autograd keeps of so many layers, and once for the whole model."""
    shape, feed, how = case.shape, case.feed, case.how
    once = feed.tokens * shape.hidden * FLOAT * (2 if how.rank is None else 1)  # the last norm
    once += 2 * feed.tokens * shape.head_dim * FLOAT  # cosines and sines
    mask = feed.batch * feed.fed * (feed.clean * how.narrow if feed.by_blocks else feed.fed)
    if feed.copied:
        mask = feed.batch * shape.heads // shape.kv_heads * TOGETHER * feed.copied * how.narrow
    if case.recompute:
        return {"activations": once + layers * feed.tokens * shape.hidden * case.frozen, "attention": mask}
    stream = kept_before(shape, feed, how) + kept_after(shape, feed, how)
    return {
        "activations": once + layers * stream,
        "attention": mask + layers * kept_attention(shape, feed, how),
        "copies": layers * _casts(case),
    }


def _casts(case: Case) -> int:
    """Of a layer's weights; none of those that lie there in the type that is computed in."""
    return kept_casts(case.shape, case.how) if case.frozen == FLOAT else 0


def _at_loss(case: Case) -> dict[str, int]:
    """The end of the forward pass: everything is kept, and a chunk of logits exists."""
    shape, how = case.shape, case.how
    parts = kept_parts(case, shape.layers)
    n, rows, narrow = case.feed.tokens, case.supervised, how.narrow
    parts["activations"] += n * shape.hidden * FLOAT + rows * shape.hidden * (FLOAT + 2 * narrow)
    if case.teacher != "none":
        parts["teacher"] = (case.feed.batch * case.feed.clean + rows) * shape.hidden * FLOAT
    wide = min(case.chunk, rows) * shape.vocab * FLOAT
    head = shape.embedding * FLOAT
    copy = shape.embedding * narrow if narrow < case.frozen else 0
    last = wide + (wide * narrow // FLOAT if narrow < FLOAT else 0)
    if not case.has_frozen_head:
        last += copy + (head if copy else 0)  # the product, and the same in fp32
    logits = max(last, wide * 13 // 4) if case.teacher != "none" else last
    parts["logits"] = logits + (0 if case.has_frozen_head else head * case.streams)
    parts["copies"] = parts.get("copies", 0) + copy
    if case.several:
        parts["gradients"] = case.learning * FLOAT
    return parts


def _layer_at_work(case: Case) -> dict[str, int]:
    """The most that one layer adds to what is kept, while the backward pass is in it."""
    shape, feed, how = case.shape, case.feed, case.how
    before, after = kept_before(shape, feed, how), kept_after(shape, feed, how)
    scores, casts, n = kept_attention(shape, feed, how), _casts(case), feed.tokens
    largest = max(rows * columns for rows, columns in shape.linear.values())
    unpacked = largest * how.narrow if how.packed else 0
    learned = largest * (how.narrow + FLOAT) if how.rank is None else 0
    widths = 2 if how.rank is None or how.narrow == FLOAT else 3  # an adapter's own output, beside gate's and up's
    inner = {"activations": before + after + widths * n * shape.inner * how.narrow, "attention": scores}
    outer = {"activations": before, "attention": scores + attention_backward(shape, feed, how)}
    again = {"activations": before, "attention": attention_forward(shape, feed, how)}
    candidates: list[dict[str, int]] = [inner, outer, *([again] if case.recompute else [])]
    parts = dict(_largest(candidates))
    parts["activations"] += n * shape.hidden * FLOAT
    parts["copies"] = casts + unpacked
    parts["gradients"] = learned
    if not case.recompute:  # the layer is kept already
        parts["activations"] -= before + after
        parts["attention"] -= scores
        parts["copies"] -= casts
    return parts


def _backward(case: Case, first: bool) -> dict[str, int]:
    """In the last layer, where all is kept, or in the first, where the gradients of all others are there."""
    shape, how = case.shape, case.how
    parts = kept_parts(case, shape.layers if first else 1)
    for part, more in _layer_at_work(case).items():
        parts[part] = parts.get(part, 0) + more
    head = 0 if case.has_frozen_head else shape.embedding * FLOAT
    all_learned = case.learning * FLOAT
    if first:  # the head's gradient, and the same times the gradient of the loss
        parts["gradients"] += (1 + case.streams) * head + (all_learned if case.several else 0)
        return parts
    parts["activations"] -= case.feed.tokens * shape.hidden * FLOAT * (2 if how.rank is None else 1)  # the last norm
    own = shape.layer_matrices * FLOAT if how.rank is None and not case.several else 0
    parts["gradients"] += all_learned - own
    # Last of all comes the embedding's gradient, whole, before it is added to the head's.
    ends = {"gradients": all_learned + (head if shape.tied else 0), "activations": parts["activations"] // shape.layers}
    return _largest((parts, ends))


def _at_step(case: Case) -> dict[str, int]:
    """Gradients and states. On a CPU the 8-bit step unpacks the states of one parameter at a time."""
    shape, how = case.shape, case.how
    parts = {"gradients": case.learning * FLOAT}
    if case.eight_bit and case.on_cpu:
        largest = max(rows * columns for rows, columns in shape.linear.values())
        largest = max(largest, shape.embedding) if how.rank is None else how.rank * max(shape.inner, shape.hidden)
        parts["optimizer"] = 5 * FLOAT * largest
    return parts
