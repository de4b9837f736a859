"""Rows with decoders of their own in one forward: each row is decided by its decoder as if it were alone."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hildanext.decode.base import Canvas, Edit, StepDecoder
from hildanext.runtime import send


def needs(decoders: Sequence[StepDecoder], canvas: Canvas) -> Bool[Tensor, "batch block"]:
    """Positions whose logits the rows' decoders will read; `decoders` has one for each row."""
    groups = _groups(decoders, canvas.tokens.device)
    if len(groups) == 1:
        return canvas.read(decoders[0].needs(canvas))
    where = torch.zeros_like(canvas.masked)
    for decoder, rows in groups.items():
        where[rows] = decoder.needs(_of(canvas, rows))
    return canvas.read(where)


def edit(
    decoders: Sequence[StepDecoder],
    logits: Float[Tensor, "rows vocab"],
    where: Bool[Tensor, "batch block"],
    canvas: Canvas,
) -> Edit:
    """What to write, given the logits at `where` (row-major). Rows whose decoders are equal are decided at once."""
    groups = _groups(decoders, canvas.tokens.device)
    if len(groups) == 1:
        return decoders[0].edit(logits, where, canvas)
    parts = []
    for decoder, rows in groups.items():
        own = _of(canvas, rows)
        if where.device.type != "cpu" and where is canvas.every:
            asked, chosen = own.every, logits.unflatten(0, where.shape)[rows].flatten(0, 1)
        else:
            asked, chosen = where[rows], logits[torch.isin(where.nonzero()[:, 0], rows)]
        parts.append((rows, decoder.edit(chosen, asked, own)))
    first = parts[0][1]
    whole = Edit(
        torch.zeros_like(canvas.masked),
        canvas.tokens.clone(),
        torch.zeros(where.shape, dtype=first.confidence.dtype, device=where.device),
        torch.zeros(len(where), dtype=torch.bool, device=where.device),
    )
    for rows, part in parts:
        whole.write[rows], whole.tokens[rows] = part.write, part.tokens
        whole.confidence[rows], whole.final[rows] = part.confidence, part.final
    return whole


def _groups(decoders: Sequence[StepDecoder], device: torch.device) -> dict[StepDecoder, Tensor]:
    """Rows (in rising order) by decoder."""
    found: dict[StepDecoder, list[int]] = {}
    for row, decoder in enumerate(decoders):
        found.setdefault(decoder, []).append(row)
    return {decoder: send(rows, device) for decoder, rows in found.items()}


def _of(canvas: Canvas, rows: Tensor) -> Canvas:
    return Canvas(
        canvas.tokens[rows], canvas.masked[rows], canvas.fixed[rows], canvas.uniform[rows], canvas.checks[rows]
    )
