"""From logits to a candidate token and its confidence.

Confidence is the candidate's probability under the clean distribution (no temperature, no filter), from a
log-sum-exp in fp32 (fp64 logits stay fp64). Sampling inverts the cumulative distribution at one uniform number per
position, drawn once per document position: the same seed gives the same text in any batch, and a candidate
changes between two steps only when its distribution does, so that a sampled block can become stable.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hildanext.errors import ConfigError


def uniforms(seed: int, count: int) -> Float[Tensor, " count"]:
    """`count` draws from [0, 1), from a generator of their own."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_sampling(temperature: float, top_p: float | None, top_k: int | None) -> None:
    """Raise `ConfigError` for a sampling knob outside its range."""
    if not 0.0 <= temperature < float("inf"):
        raise ConfigError(f"temperature {temperature} is out of range", "give 0 (greedy) or a positive number")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ConfigError(f"top_p {top_p} is out of range", "give a number in (0, 1], or leave it out")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k {top_k} is out of range", "give 1 or more, or leave it out")


def candidates(
    logits: Float[Tensor, "rows vocab"],
    uniform: Float[Tensor, " rows"] | None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """One token for each row and its confidence. Greedy at temperature 0, where no `uniform` is needed."""
    best, tokens = logits.max(-1)
    if temperature > 0.0:
        assert uniform is not None, "sampling needs a draw for each row"
        tokens = _sample(logits / temperature, uniform, top_p, top_k)
        best = logits.gather(-1, tokens[:, None])[:, 0]
    return tokens, (best - logits.logsumexp(-1)).exp()


def _sample(
    logits: Float[Tensor, "rows vocab"], uniform: Float[Tensor, " rows"], top_p: float | None, top_k: int | None
) -> Int[Tensor, " rows"]:
    ids: Tensor | None = None
    if top_k is not None:
        logits, ids = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
    elif top_p is not None:
        logits, ids = logits.sort(dim=-1, descending=True)
    probabilities = logits.softmax(-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    cumulative = probabilities.cumsum(-1)
    height = uniform[:, None].to(cumulative.dtype) * cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, height, right=True).clamp_max(cumulative.shape[-1] - 1)
    # Rounding may land on a token of probability zero at the end: step back to the likeliest then.
    likely = probabilities.gather(-1, picked) > 0
    picked = torch.where(likely, picked, probabilities.argmax(-1, keepdim=True))[:, 0]
    return picked if ids is None else ids.gather(-1, picked[:, None])[:, 0]
