"""From logits to a token: the one sampler, of the parent's next token and of every position of a block.

Sampling inverts the cumulative distribution at one uniform number per row. Ids stay in the vocabulary's order, not in
that of their probabilities: where two ids swap ranks, nobody's interval moves, so that a position keeps its candidate
while its distribution changes little, and a sampled block can become stable. The sum is taken in fp64, so that rare
ids keep their probability.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hildanext.core.errors import LogitsNotFinite


def uniforms(seed: int, count: int) -> Float[Tensor, " count"]:
    """`count` draws from [0, 1), from a generator of their own, on the CPU: a seed gives the same ones everywhere."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def candidates(
    logits: Float[Tensor, "rows vocab"],
    uniform: Float[Tensor, " rows"] | None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """One token for each row and its confidence. Greedy at temperature 0, where no `uniform` is needed.

    Confidence is the candidate's probability under the clean distribution (no temperature, no filter), from a
    log-sum-exp in fp32 (fp64 logits stay fp64).
    """
    best, tokens = logits.max(-1)
    if temperature > 0.0:
        assert uniform is not None, "sampling needs a draw for each row"
        tokens = sample(logits, uniform, temperature, top_p, top_k)
        best = logits.gather(-1, tokens[:, None])[:, 0]
    return tokens, (best - logits.logsumexp(-1)).exp()


NO_TOKEN = -1
"""In the place of a token: the row's logits are NaN or infinite."""


def next_tokens(
    logits: Float[Tensor, "rows vocab"],
    uniform: Float[Tensor, " rows"],
    temperature: float,
    top_p: float | None = None,
    top_k: int | None = None,
) -> Int[Tensor, " rows"]:
    """As `sample`, and `NO_TOKEN` in a row that has no token: the host learns of it with the tokens it waits for."""
    tokens = sample(logits, uniform, temperature, top_p, top_k)
    return torch.where(logits.amax(-1).isfinite(), tokens, NO_TOKEN)


def read_tokens(tokens: Int[Tensor, " rows"], rows: Sequence[int] | None = None) -> list[int]:
    """The parent's next tokens, on the host. Raises `LogitsNotFinite` naming the `rows` that have none."""
    drawn = tokens.tolist()
    without = [row for row, token in zip(rows or range(len(drawn)), drawn, strict=True) if token == NO_TOKEN]
    if without:
        raise LogitsNotFinite("autoregressive parent", without)
    return drawn


def sample(
    logits: Float[Tensor, "rows vocab"],
    uniform: Float[Tensor, " rows"],
    temperature: float,
    top_p: float | None = None,
    top_k: int | None = None,
) -> Int[Tensor, " rows"]:
    """One token for each row: top-k first, then the nucleus of what it leaves. Greedy at temperature 0; None is off."""
    if temperature <= 0.0:
        return logits.argmax(-1)
    probability, ids = _filtered(logits, temperature, top_p, top_k)
    cumulative = probability.cumsum(-1)
    height = uniform[:, None].to(cumulative) * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, height, right=True).clamp_max(cumulative.shape[-1] - 1)
    # Rounding may land on an id of probability zero at the end: step back to the likeliest then.
    possible = probability.gather(-1, chosen) > 0
    chosen = torch.where(possible, chosen, probability.argmax(-1, keepdim=True))
    return (chosen if ids is None else ids.gather(-1, chosen))[:, 0]


def law(
    logits: Float[Tensor, "rows vocab"], temperature: float, top_p: float | None = None, top_k: int | None = None
) -> Float[Tensor, "rows vocab"]:
    """The distribution that `sample` draws from, renormalised, in fp64. At temperature 0 all of it is on the argmax."""
    if temperature <= 0.0:
        certain = torch.zeros_like(logits, dtype=torch.float64)
        return certain.scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    probability, ids = _filtered(logits, temperature, top_p, top_k)
    if ids is not None:
        probability = torch.zeros_like(logits, dtype=torch.float64).scatter_(-1, ids, probability)
    return probability / probability.sum(-1, keepdim=True)


def _filtered(
    logits: Float[Tensor, "rows vocab"], temperature: float, top_p: float | None, top_k: int | None
) -> tuple[Float[Tensor, "rows kept"], Int[Tensor, "rows kept"] | None]:
    """Weights after temperature and filters, and of which ids they are; None: of every one, in order."""
    logits, ids = logits / temperature, None
    if top_k is not None and top_k < logits.shape[-1]:
        ids = _highest(logits, top_k)
        logits = logits.gather(-1, ids)
    probability = logits.softmax(-1).double()
    if top_p is not None and top_p < 1.0:
        ordered, order = probability.sort(dim=-1, descending=True, stable=True)
        # What lies before an id decides, so that the likeliest is always kept.
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
        probability = torch.zeros_like(probability).scatter_(-1, order, ordered)
    return probability, ids


def _highest(logits: Float[Tensor, "rows vocab"], k: int) -> Int[Tensor, "rows k"]:
    """The ids of the k highest logits, rising; of equal ones the lowest, whatever the device's `topk` prefers."""
    kth = logits.topk(k, dim=-1).values[:, -1:]
    above, level = logits > kth, logits == kth
    kept = above | (level & (level.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    places = torch.arange(1, k + 1, device=logits.device).expand(len(logits), k).contiguous()
    return torch.searchsorted(kept.cumsum(-1), places).clamp_max(logits.shape[-1] - 1)
