"""Head and loss in one: cross-entropy, KL and entropy over a large vocabulary without keeping the logits.

Logits exist for one chunk of rows at a time; their gradient is formed at once and folded into the
gradients of the hidden states and of the head (the idea of fused linear cross-entropy, as SDAR and
Liger-Kernel use it; here in plain PyTorch, so that Pascal and CPU run it too).
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class RowLosses(NamedTuple):
    """`total` carries the gradient; the rest are detached, one entry per row."""

    total: Float[Tensor, ""]
    cross_entropy: Float[Tensor, " rows"]
    divergence: Float[Tensor, " rows"]
    predicted: Int[Tensor, " rows"]
    """The most probable id."""
    confidence: Float[Tensor, " rows"]
    """Its probability."""
    entropy: Float[Tensor, " rows"]
    """Of the prediction, where that is right and its entropy has a weight; 0 elsewhere."""


def _against_teacher(logits: Tensor, student: Tensor, banned: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's probabilities and KL(teacher || student) per row; `student` holds probabilities.

    `logits` are overwritten: with a large vocabulary each further copy is the peak of a whole step.
    """
    logits[:, banned] = float("-inf")
    log_teacher = logits.log_softmax(-1)
    gap = torch.sub(log_teacher, torch.clamp(student, min=1e-38, out=logits).log_(), out=logits)
    teacher = log_teacher.exp_()
    return teacher, gap.masked_fill_(teacher == 0, 0.0).mul_(teacher).sum(-1)


def _predict(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities (in the place of the logits), cross-entropy, most probable id and its probability of each row."""
    top, best = logits.max(-1, keepdim=True)
    chosen = logits.gather(1, labels[:, None])
    probabilities = logits.sub_(top).exp_()
    mass = probabilities.sum(-1, keepdim=True)
    cross_entropy = top + mass.log() - chosen
    return probabilities.div_(mass), cross_entropy[:, 0], best[:, 0], 1.0 / mass[:, 0]


def _entropy(probabilities: Tensor, weight: Tensor, entropies: Tensor) -> tuple[Tensor, Tensor]:
    """The rows whose weight is not zero and the gradient of their weighted entropies to the logits.

    The entropies are written to `entropies`. With p the softmax of z and H its entropy, dH/dz = -p (log p + H).
    """
    if weight.device.type == "cpu":
        rows = weight.nonzero()[:, 0]
    else:  # all of them: to count those with a weight, the host would wait
        rows = torch.arange(len(weight), device=weight.device)
    p = probabilities[rows]
    log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log_()
    entropy = -(p * log_p).sum(-1)
    entropies[rows] = torch.where(weight[rows] != 0, entropy, torch.zeros_like(entropy))
    return rows, log_p.add_(entropy[:, None]).mul_(p).mul_(-weight[rows, None])


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without a product of the head's size beside it where the types allow."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _narrow(teacher_head: Tensor | None, head: Tensor, matrix: Tensor) -> Tensor:
    """The teacher's head in the dtype of `matrix`, the copy of `head` in it."""
    if teacher_head is None or teacher_head.data_ptr() == head.data_ptr():
        return matrix  # a parent that is the model without its adapters: one narrow copy serves both
    return teacher_head.to(matrix.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        labels: Tensor,
        weight: Tensor,
        divergence_weight: Tensor | None,
        teacher_hidden: Tensor | None,
        teacher_head: Tensor | None,
        banned: Tensor,
        chunk: int,
        entropy_weight: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        need_hidden, need_head = ctx.needs_input_grad[:2]
        matrix = head.to(hidden.dtype)
        teacher_matrix = _narrow(teacher_head, head, matrix)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_head = torch.zeros(head.shape, dtype=wide, device=head.device) if need_head else None
        rows = hidden.shape[0]
        cross_entropy = torch.zeros(rows, dtype=wide, device=hidden.device)
        divergence, confidence, entropy = (torch.zeros_like(cross_entropy) for _ in range(3))
        predicted = torch.zeros(rows, dtype=torch.long, device=hidden.device)
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ matrix.T).to(wide)
            logits[:, banned] = float("-inf")
            here = torch.arange(logits.shape[0], device=logits.device)
            grad, cross_entropy[part], predicted[part], confidence[part] = _predict(logits, labels[part])
            entropy_grad = None
            if entropy_weight is not None:
                wanted = entropy_weight[part].to(wide) * (predicted[part] == labels[part])
                entropy_rows, entropy_grad = _entropy(grad, wanted, entropy[part])
            scale = weight[part].to(wide)
            if divergence_weight is not None and teacher_head is not None and teacher_hidden is not None:
                logits = (teacher_hidden[part].to(hidden.dtype) @ teacher_matrix.T).to(wide)
                teacher, divergence[part] = _against_teacher(logits, grad, banned)
                kl_weight = divergence_weight[part].to(wide)
                grad.mul_((scale + kl_weight)[:, None]).sub_(teacher.mul_(kl_weight[:, None]))
                del teacher
            else:
                grad.mul_(scale[:, None])
            grad[here, labels[part]] -= scale
            if entropy_grad is not None:
                grad[entropy_rows] += entropy_grad
            narrow = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = narrow @ matrix
            if grad_head is not None:
                _add_product(grad_head, narrow.T, hidden[part])
            del logits, grad, narrow, entropy_grad  # or they would live on beside the next chunk's
        total = (cross_entropy * weight.to(wide)).sum()
        if divergence_weight is not None:
            total = total + (divergence * divergence_weight.to(wide)).sum()
        if entropy_weight is not None:
            total = total + (entropy * entropy_weight.to(wide)).sum()
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head.dtype
        ctx.mark_non_differentiable(cross_entropy, divergence, predicted, confidence, entropy)
        return total, cross_entropy, divergence, predicted, confidence, entropy

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total.to(grad_hidden.dtype)
        if grad_head is not None:
            grad_head = (grad_head * grad_total).to(ctx.head_dtype)
        return (grad_hidden, grad_head, None, None, None, None, None, None, None, None)


def linear_cross_entropy(
    hidden: Float[Tensor, "rows hidden"],
    head: Float[Tensor, "vocab hidden"],
    labels: Int[Tensor, " rows"],
    weight: Float[Tensor, " rows"],
    banned: Bool[Tensor, " vocab"],
    divergence_weight: Float[Tensor, " rows"] | None = None,
    teacher_hidden: Float[Tensor, "rows teacher_hidden"] | None = None,
    teacher_head: Float[Tensor, "vocab teacher_hidden"] | None = None,
    chunk: int = 128,
    entropy_weight: Float[Tensor, " rows"] | None = None,
) -> RowLosses:
    """Sum over rows of `weight * CE(label) + divergence_weight * KL(teacher || student) + entropy_weight * entropy`, in
    nats; the entropy only where the label is the most probable id.

    Banned ids (mask, unused rows) get no probability in either distribution. Zero rows give a zero loss
    with finite gradients. Where gradients are off none are formed.
    """
    if not torch.is_grad_enabled():  # the function below sees only that its inputs ask for gradients
        hidden, head = hidden.detach(), head.detach()
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):  # one cast of the head for the call, not one per chunk
        return RowLosses(
            *_LinearCrossEntropy.apply(
                hidden,
                head,
                labels,
                weight,
                divergence_weight,
                teacher_hidden,
                teacher_head,
                banned,
                chunk,
                entropy_weight,
            )
        )
