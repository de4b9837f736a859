"""What autograd keeps of one decoder layer until the backward pass reaches it, tensor by tensor.

The lists follow Transformers' Llama, Qwen2 and Qwen3 layers, peft's adapters and our attention; a test counts what
is really kept and compares. `float` is fp32: embeddings are, so the residual stream and the norms stay fp32 under
autocast, and each linear layer makes its own narrow copy of its input.
"""

from dataclasses import dataclass

from hildanext.memory_plan.architecture import Architecture
from hildanext.models.lora import LoraConfig

FLOAT = 4


@dataclass(frozen=True)
class Feed:
    """Tokens of one forward: `noisy` and `clean` ones of each row; `by_blocks` where blocks lie on the row grid."""

    batch: int
    noisy: int
    clean: int
    block: int
    by_blocks: bool
    copied: int = 0
    """Keys of one document that the calls of attention copy, where masks attend a few groups at a time to clean rows
    that are kept (`models/attention/kept.py`)."""

    branches: int = 0
    """Answers of a row that attend each by itself behind the row's first `shared` clean tokens
    (`models/attention/branched.py`); 0 where a row attends as a whole."""
    shared: int = 0

    @property
    def attended(self) -> tuple[int, int, int, int]:
        """Rows of attention, and noisy columns, clean ones and clean keys of each: a branch is a row, and its clean
        keys are the beginning's too."""
        if not self.branches:
            return self.batch, self.noisy, self.clean, self.clean
        clean = (self.clean - self.shared) // self.branches
        return self.batch * self.branches, self.noisy // self.branches, clean, self.shared + clean

    @property
    def fed(self) -> int:
        return self.noisy + self.clean

    @property
    def tokens(self) -> int:
        return self.batch * self.fed


@dataclass(frozen=True)
class Learning:
    """What learns, and in how many bytes a number is computed."""

    narrow: int
    """2 under bf16 autocast, 4 in fp32."""
    rank: int | None
    """Of the adapters; None where every weight learns."""
    targets: tuple[str, ...]
    packed: bool
    """Linear layers in 4 bits."""

    def keeps_input(self, layer: str) -> bool:
        return self.rank is None or layer in self.targets


def learning(lora: LoraConfig | None, packed: bool, narrow: int) -> Learning:
    """Of a section's knobs."""
    return Learning(narrow, None if lora is None else lora.rank, () if lora is None else lora.targets, packed)


def kept_before(shape: Architecture, feed: Feed, how: Learning) -> int:
    """Bytes kept of the attention half but for its products: residual stream, norm, inputs of the projections."""
    n = feed.tokens
    total = _norm(shape, feed, how)
    total += _inputs(shape, feed, how, ("q_proj", "k_proj", "v_proj")) + _inputs(shape, feed, how, ("o_proj",))
    if shape.normed_heads:
        total += n * (shape.query + shape.key) * FLOAT + n * (shape.heads + shape.kv_heads) * FLOAT
        if how.rank is None:
            total += n * (shape.query + shape.key) * how.narrow
    return total


def kept_after(shape: Architecture, feed: Feed, how: Learning) -> int:
    """Bytes kept of the feed-forward half: as above, and gate, its activation and up."""
    inputs = _inputs(shape, feed, how, ("gate_proj", "up_proj")) + _inputs(shape, feed, how, ("down_proj",))
    return _norm(shape, feed, how) + inputs + 3 * feed.tokens * shape.inner * how.narrow


def _norm(shape: Architecture, feed: Feed, how: Learning) -> int:
    """The input and its scale; where the norm's own weight learns, the normed input too."""
    return feed.tokens * (shape.hidden * FLOAT * (2 if how.rank is None else 1) + FLOAT)


def _inputs(shape: Architecture, feed: Feed, how: Learning, group: tuple[str, ...]) -> int:
    """Inputs of linear layers that share one: autocast copies it for each, fp32 does not. Adapters add their middle."""
    learning = [name for name in group if how.keeps_input(name)]
    copies = len(learning) if how.narrow < FLOAT else min(len(learning), 1)
    middle = 0 if how.rank is None else how.rank * len(learning)
    return feed.tokens * how.narrow * (copies * shape.linear[group[0]][0] + middle)


def kept_attention(shape: Architecture, feed: Feed, how: Learning) -> int:
    """Bytes kept of queries, keys, values and scores."""
    b, c, heads = feed.batch, how.narrow, shape.heads
    if feed.copied:
        return feed.tokens * 2 * shape.query * c + b * feed.copied * 2 * shape.key * c + b * heads * feed.fed * FLOAT
    if not feed.by_blocks:
        folded_mask = b * (heads // shape.kv_heads) * feed.fed * feed.fed * c
        return feed.tokens * 2 * (shape.query + shape.key) * c + folded_mask + b * heads * feed.fed * FLOAT
    rows, noisy, clean, seen = feed.attended
    own = noisy + clean
    queries = (own + noisy) * shape.query
    copies = 2 if rows > 1 else (3 if c < FLOAT else 4)  # a product of one row copies the keys it expands
    keys = (copies * seen + 2 * noisy) * shape.key
    scores = own * seen + noisy * (seen + feed.block) + clean * seen + noisy * feed.block
    kept = rows * (queries + keys + heads * scores) * c
    return kept + (b * feed.shared * 2 * (shape.query + shape.key) * c if feed.branches else 0)


def attention_forward(shape: Architecture, feed: Feed, how: Learning) -> int:
    """The most that exists of one attention while it is computed: what is kept, and what its lines still name."""
    n, c, heads = feed.tokens, how.narrow, shape.heads
    named = n * (2 * shape.query + shape.key) * FLOAT + n * (shape.key + shape.query) * c
    if not feed.by_blocks:
        return kept_attention(shape, feed, how) + named
    rows, noisy, clean, seen = feed.attended
    own = noisy + clean
    softmax = own * seen + noisy * (seen + feed.block) + 2 * clean * seen
    parts = kept_attention(shape, feed, how)
    scores = rows * heads * (own * seen + noisy * (seen + feed.block) + clean * seen + noisy * feed.block) * c
    return named + parts - scores + max(scores + n * shape.query * c * 3 // 2, rows * heads * softmax * c)


def attention_backward(shape: Architecture, feed: Feed, how: Learning) -> int:
    """Beside what is kept: gradients of the probabilities, and of the part of them that weighs the own block."""
    c, heads = how.narrow, shape.heads
    if not feed.by_blocks:
        return 2 * feed.tokens * (shape.query + shape.key) * c
    rows, noisy, clean, seen = feed.attended
    return rows * heads * ((noisy + clean) * seen + noisy * (seen + feed.block)) * c


def kept_casts(shape: Architecture, how: Learning) -> int:
    """Bytes of a layer's weights in the compute type: under autocast a copy of each is kept, 4-bit ones aside."""
    if how.narrow == FLOAT:
        return 0
    frozen = 0 if how.packed else shape.layer_matrices * how.narrow
    if how.rank is None:
        return frozen
    return frozen + (shape.adapters(how.rank, how.targets) - shape.hidden) // shape.layers * how.narrow
