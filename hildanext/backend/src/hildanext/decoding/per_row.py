"""Rows with decoders of their own in one forward: each row is decided by its decoder as if it were alone."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hildanext.core.runtime import send
from hildanext.decoding.base import Canvas, CausalLogits, Decoder, Denoiser, Edit


class PerRow(Decoder):
    """A decoder for each row of a canvas. Rows whose decoders are equal are decided at once."""

    def __init__(self, decoders: Sequence[Decoder]) -> None:
        self.groups: dict[Decoder, list[int]] = {}
        """Rows, in rising order, by decoder."""
        for row, decoder in enumerate(decoders):
            self.groups.setdefault(decoder, []).append(row)

    def needs(self, canvas: Canvas) -> Bool[Tensor, "batch block"]:
        if len(self.groups) == 1:
            return next(iter(self.groups)).needs(canvas)
        where = torch.zeros_like(canvas.masked)
        for decoder, rows in self._rows(canvas):
            where[rows] = decoder.needs(_part(canvas, rows))
        return where

    def edit(self, logits: Float[Tensor, "rows vocab"], where: Bool[Tensor, "batch block"], canvas: Canvas) -> Edit:
        if len(self.groups) == 1:
            return next(iter(self.groups)).edit(logits, where, canvas)
        parts = []
        for decoder, rows in self._rows(canvas):
            own = _part(canvas, rows)
            if where.device.type != "cpu" and where is canvas.every:
                needed, chosen = own.every, logits.unflatten(0, where.shape)[rows].flatten(0, 1)
            else:
                needed, chosen = where[rows], logits[torch.isin(where.nonzero()[:, 0], rows)]
            parts.append((rows, decoder.edit(chosen, needed, own)))
        return _whole(canvas, parts)

    def verify(self, edit: Edit, canvas: Canvas, causal_logits: CausalLogits) -> Edit:
        if all(type(decoder).verify is Decoder.verify for decoder in self.groups):
            return edit
        parts = []
        for decoder, rows in self._rows(canvas):
            own = Edit(edit.write[rows], edit.tokens[rows], edit.confidence[rows], edit.final[rows])
            parts.append((rows, decoder.verify(own, _part(canvas, rows), _among(causal_logits, canvas, rows))))
        return _whole(canvas, parts)

    def after_block(self, denoiser: Denoiser, rows: Sequence[int]) -> None:
        for decoder, own in self.groups.items():
            finished = [row for row in own if row in rows]
            if finished:
                decoder.after_block(denoiser, finished)

    def _rows(self, canvas: Canvas) -> list[tuple[Decoder, Tensor]]:
        device = canvas.tokens.device
        return [(decoder, send(rows, device)) for decoder, rows in self.groups.items()]


def _among(causal_logits: CausalLogits, canvas: Canvas, rows: Tensor) -> CausalLogits:
    """Asks about some rows of a canvas alone."""

    def ask(tokens: Tensor, where: Tensor) -> Tensor:
        every, asked = canvas.tokens.clone(), torch.zeros_like(canvas.masked)
        every[rows], asked[rows] = tokens, where
        return causal_logits(every, asked)

    return ask


def _whole(canvas: Canvas, parts: Sequence[tuple[Tensor, Edit]]) -> Edit:
    """The edits of groups of rows as one."""
    device = canvas.tokens.device
    whole = Edit(
        torch.zeros_like(canvas.masked),
        canvas.tokens.clone(),
        torch.zeros(canvas.masked.shape, dtype=parts[0][1].confidence.dtype, device=device),
        torch.zeros(len(canvas.masked), dtype=torch.bool, device=device),
    )
    for rows, part in parts:
        whole.write[rows], whole.tokens[rows] = part.write, part.tokens
        whole.confidence[rows], whole.final[rows] = part.confidence, part.final
    return whole


def _part(canvas: Canvas, rows: Tensor) -> Canvas:
    return Canvas(
        canvas.tokens[rows], canvas.masked[rows], canvas.fixed[rows], canvas.uniform[rows], canvas.checks[rows]
    )
