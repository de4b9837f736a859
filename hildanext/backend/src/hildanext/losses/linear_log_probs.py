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
    kept: Int[Tensor, " rows"] | None = None,
) -> Float[Tensor, " rows"]:
    """log p(label) of each row, the logits divided by `temperature`; banned ids have no probability.

    Where `kept` has a number n of a row, the law is that of the label and the n - 1 likeliest others, renormalised; 0
    is every id.

    `linear_cross_entropy` forms its gradient in the forward and so must know each row's weight; a ratio or a clip of
    log-probabilities is known only afterwards. Here the backward computes each chunk's logits again: at most one
    chunk of them is alive.
    """
    counts = [None] * len(hidden.split(chunk)) if kept is None else kept.split(chunk)
    parts = zip(hidden.split(chunk), labels.split(chunk), counts, strict=True)
    return torch.cat(
        [checkpoint(_log_probs, *part, head, banned, temperature, count, use_reentrant=False) for *part, count in parts]
    )


def _log_probs(
    hidden: Tensor, labels: Tensor, head: Tensor, banned: Tensor, temperature: float, kept: Tensor | None
) -> Tensor:
    logits = hidden @ head.to(hidden.dtype).T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = (logits / temperature).masked_fill(banned, float("-inf"))
    label = logits.gather(1, labels[:, None])[:, 0]
    whole = logits.logsumexp(-1)
    if kept is None:
        return label - whole
    return label - torch.where(kept > 0, _of_kept(logits, labels, kept), whole)


def _of_kept(
    logits: Float[Tensor, "rows vocab"], labels: Int[Tensor, " rows"], kept: Int[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """Log of the mass of each row's label and its likeliest others, `kept` in all."""
    most = min(max(int(kept.max()) - 1, 0), logits.shape[-1] - 1)
    highest = logits.scatter(1, labels[:, None], float("-inf")).topk(most, dim=-1).values
    beyond = torch.arange(most, device=logits.device) >= kept[:, None] - 1
    return torch.cat([logits.gather(1, labels[:, None]), highest.masked_fill(beyond, float("-inf"))], -1).logsumexp(-1)
