"""log p of each label through the head, for any gradient that comes from above, without keeping the logits."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def linear_log_probs(
    hidden: Float[Tensor, "rows hidden"],
    head: Float[Tensor, "vocab hidden"],
    labels: Int[Tensor, " rows"],
    banned: Bool[Tensor, " vocab"],
    chunk: int = 128,
    temperature: float = 1.0,
) -> Float[Tensor, " rows"]:
    """log p(label) of each row, the logits divided by `temperature`; banned ids have no probability.

    `linear_cross_entropy` forms its gradient in the forward and so must know each row's weight; a ratio or a clip of
    log-probabilities is known only afterwards. Here the backward computes each chunk's logits again: at most one
    chunk of them is alive.
    """
    parts = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    return torch.cat([checkpoint(_log_probs, *part, head, banned, temperature, use_reentrant=False) for part in parts])


def _log_probs(hidden: Tensor, labels: Tensor, head: Tensor, banned: Tensor, temperature: float) -> Tensor:
    logits = hidden @ head.to(hidden.dtype).T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = (logits / temperature).masked_fill(banned, float("-inf"))
    return logits.gather(1, labels[:, None])[:, 0] - logits.logsumexp(-1)
