"""Head and loss in one: cross-entropy and KL over a large vocabulary without keeping the logits.

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


def _against_teacher(logits: Tensor, student: Tensor, banned: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's probabilities and KL(teacher || student) per row; `student` holds probabilities.

    `logits` are overwritten: with a large vocabulary each further copy is the peak of a whole step.
    """
    logits[:, banned] = float("-inf")
    log_teacher = logits.log_softmax(-1)
    gap = torch.sub(log_teacher, torch.clamp(student, min=1e-38, out=logits).log_(), out=logits)
    teacher = log_teacher.exp_()
    return teacher, gap.masked_fill_(teacher == 0, 0.0).mul_(teacher).sum(-1)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without a product of the head's size beside it where the types allow."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        need_hidden, need_head = ctx.needs_input_grad[:2]
        matrix = head.to(hidden.dtype)
        teacher_matrix = None if teacher_head is None else teacher_head.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_head = torch.zeros(head.shape, dtype=wide, device=head.device) if need_head else None
        rows = hidden.shape[0]
        cross_entropy = torch.zeros(rows, dtype=wide, device=hidden.device)
        divergence = torch.zeros_like(cross_entropy)
        predicted = torch.zeros(rows, dtype=torch.long, device=hidden.device)
        confidence = torch.zeros_like(cross_entropy)
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ matrix.T).to(wide)
            logits[:, banned] = float("-inf")
            here = torch.arange(logits.shape[0], device=logits.device)
            top, best = logits.max(-1, keepdim=True)
            predicted[part] = best[:, 0]
            chosen = logits[here, labels[part]]
            grad = logits.sub_(top).exp_()
            mass = grad.sum(-1, keepdim=True)
            log_mass = mass.log()
            cross_entropy[part] = (top + log_mass)[:, 0] - chosen
            confidence[part] = 1.0 / mass[:, 0]
            grad.div_(mass)
            scale = weight[part].to(wide)
            if divergence_weight is not None and teacher_matrix is not None and teacher_hidden is not None:
                logits = (teacher_hidden[part].to(hidden.dtype) @ teacher_matrix.T).to(wide)
                teacher, divergence[part] = _against_teacher(logits, grad, banned)
                also = divergence_weight[part].to(wide)
                grad.mul_((scale + also)[:, None]).sub_(teacher.mul_(also[:, None]))
                del teacher
            else:
                grad.mul_(scale[:, None])
            grad[here, labels[part]] -= scale
            narrow = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = narrow @ matrix
            if grad_head is not None:
                _add_product(grad_head, narrow.T, hidden[part])
            del logits, grad, narrow  # or they would live on beside the next chunk's
        total = (cross_entropy * weight.to(wide)).sum()
        if divergence_weight is not None:
            total = total + (divergence * divergence_weight.to(wide)).sum()
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head.dtype
        ctx.mark_non_differentiable(cross_entropy, divergence, predicted, confidence)
        return total, cross_entropy, divergence, predicted, confidence

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total.to(grad_hidden.dtype)
        if grad_head is not None:
            grad_head = (grad_head * grad_total).to(ctx.head_dtype)
        return (grad_hidden, grad_head, None, None, None, None, None, None, None)


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
) -> RowLosses:
    """Sum over rows of `weight * CE(label) + divergence_weight * KL(teacher || student)`, in nats.

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
                hidden, head, labels, weight, divergence_weight, teacher_hidden, teacher_head, banned, chunk
            )
        )
