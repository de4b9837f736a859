"""Rows with decoders of their own in one forward: each row is decided by its decoder as if it were alone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hildanext.core.runtime import send
from hildanext.decoding.base import Canvas, CausalLogits, Chances, Decoder, Denoiser, Edit
from hildanext.models.soft_inputs import InputTable, SoftInputs


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
        for decoder, rows, own in self._parts(canvas):
            where[rows] = decoder.needs(own)
        return where

    def soft(self, canvas: Canvas, input_table: Callable[[], InputTable]) -> SoftInputs | None:
        if all(type(decoder).soft is Decoder.soft for decoder in self.groups):
            return None
        if len(self.groups) == 1:
            return next(iter(self.groups)).soft(canvas, input_table)
        asked = [(rows, decoder.soft(own, input_table)) for decoder, rows, own in self._parts(canvas)]
        parts = [(rows, soft) for rows, soft in asked if soft is not None]
        if not parts:
            return None
        one = parts[0][1]
        size, hidden = canvas.masked.shape, one.states.shape[-1]
        whole = SoftInputs(one.weight.new_zeros(size), one.states.new_zeros(*size, hidden))
        for rows, soft in parts:
            whole.weight[rows], whole.states[rows] = soft
        return whole

    def edit(self, logits: Float[Tensor, "rows vocab"], where: Bool[Tensor, "batch block"], canvas: Canvas) -> Edit:
        if len(self.groups) == 1:
            return next(iter(self.groups)).edit(logits, where, canvas)
        parts = []
        for decoder, rows, own in self._parts(canvas):
            chosen, needed = _logits_of(logits, where, canvas, rows, own)
            parts.append((rows, decoder.edit(chosen, needed, own)))
        return self._whole(canvas, parts)

    def verify(self, edit: Edit, canvas: Canvas, causal_logits: CausalLogits) -> Edit:
        if all(type(decoder).verify is Decoder.verify for decoder in self.groups):
            return edit
        parts = []
        for decoder, rows, own in self._parts(canvas):
            parts.append((rows, decoder.verify(_edit_of(edit, rows), own, _among(causal_logits, canvas, rows))))
        return self._whole(canvas, parts)

    def chances(
        self, logits: Float[Tensor, "rows vocab"], where: Bool[Tensor, "batch block"], canvas: Canvas, edit: Edit
    ) -> Chances:
        if len(self.groups) == 1:
            return next(iter(self.groups)).chances(logits, where, canvas, edit)
        nothing = torch.zeros(where.shape, dtype=torch.float64, device=where.device)
        whole = Chances(nothing, nothing.clone())
        for decoder, rows, own in self._parts(canvas):
            if any(row.recorded for row in own.rows):
                chosen, needed = _logits_of(logits, where, canvas, rows, own)
                part = decoder.chances(chosen, needed, own, _edit_of(edit, rows))
                whole.logp[rows], whole.entropy[rows] = part.logp, part.entropy
                if part.kept is not None:
                    every = torch.zeros_like(canvas.tokens) if whole.kept is None else whole.kept
                    every[rows] = part.kept
                    whole = replace(whole, kept=every)
        return whole

    def after_block(self, denoiser: Denoiser, rows: Sequence[int]) -> None:
        for decoder, own in self.groups.items():
            finished = [row for row in own if row in rows]
            if finished:
                decoder.after_block(denoiser, finished)

    def _parts(self, canvas: Canvas) -> Iterator[tuple[Decoder, Tensor, Canvas]]:
        """Each decoder, its rows and the canvas of these."""
        for decoder, numbers in self.groups.items():
            rows = send(numbers, canvas.tokens.device)
            yield decoder, rows, _part(canvas, rows, numbers)

    def _whole(self, canvas: Canvas, parts: Sequence[tuple[Tensor, Edit]]) -> Edit:
        """The edits of the groups as one."""
        device = canvas.tokens.device
        whole = Edit(
            torch.zeros_like(canvas.masked),
            canvas.tokens.clone(),
            torch.zeros(canvas.masked.shape, dtype=parts[0][1].confidence.dtype, device=device),
            torch.zeros(len(canvas.masked), dtype=torch.bool, device=device),
        )
        memory: list[Any] = [None] * len(canvas.masked)
        for numbers, (rows, part) in zip(self.groups.values(), parts, strict=True):
            whole.write[rows], whole.tokens[rows] = part.write, part.tokens
            whole.confidence[rows], whole.final[rows] = part.confidence, part.final
            for number, kept in zip(numbers, part.memory, strict=False):  # of a decoder without memory there is none
                memory[number] = kept
        remembers = any(part.memory for _, part in parts)
        return replace(whole, memory=tuple(memory)) if remembers else whole


def _logits_of(
    logits: Tensor, where: Tensor, canvas: Canvas, rows: Tensor, own: Canvas
) -> tuple[Float[Tensor, "rows vocab"], Bool[Tensor, "batch block"]]:
    """The logits of some rows, and where in the canvas of these they are."""
    if where.device.type != "cpu" and where is canvas.every:
        return logits.unflatten(0, where.shape)[rows].flatten(0, 1), own.every
    return logits[torch.isin(where.nonzero()[:, 0], rows)], where[rows]


def _edit_of(edit: Edit, rows: Tensor) -> Edit:
    memory = tuple(edit.memory[row] for row in rows.tolist()) if edit.memory else ()
    return Edit(edit.write[rows], edit.tokens[rows], edit.confidence[rows], edit.final[rows], memory=memory)


def _among(causal_logits: CausalLogits, canvas: Canvas, rows: Tensor) -> CausalLogits:
    """Asks about some rows of a canvas alone."""

    def ask(tokens: Tensor, where: Tensor) -> Tensor:
        every, asked = canvas.tokens.clone(), torch.zeros_like(canvas.masked)
        every[rows], asked[rows] = tokens, where
        return causal_logits(every, asked)

    return ask


def _part(canvas: Canvas, rows: Tensor, numbers: Sequence[int]) -> Canvas:
    ends = canvas.ends
    return Canvas(
        canvas.tokens[rows],
        canvas.masked[rows],
        canvas.fixed[rows],
        canvas.uniform[rows],
        canvas.checks[rows],
        tuple(canvas.rows[number] for number in numbers) if canvas.rows else (),
        tuple(canvas.memory[number] for number in numbers) if canvas.memory else (),
        None if canvas.closed is None else canvas.closed[rows],
        None if canvas.shut is None else canvas.shut[rows],
        None if ends is None else ends._replace(own=ends.own[rows]),
    )
