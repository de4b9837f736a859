"""What was written of a document, as arrays: every action, when it was taken and how likely it was. Fit to learn from.

numpy alone, so that no tensor of inference mode reaches autograd.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from hildanext.core.errors import ConfigError
from hildanext.decoding.base import Canvas, Chances, Decoder, Edit


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The whole blocks of one document, the prompt included; arrays are by position in it, log p and entropy in nats.

    The terminal block is not cut where the text ends: what was written behind was drawn like the rest, and later steps
    of the block saw it; so they did the masks that nobody filled there.
    """

    tokens: Int[np.ndarray, " positions"]
    """As they are in the end, edits included."""
    prompt: int
    """Tokens of the prompt."""
    step: Int[np.ndarray, " positions"]
    """Step of its block, from 0 on, in which the position's mask was filled; -1 in the prompt, and where it stayed."""
    logp: Float[np.ndarray, " positions"]
    """Log-probability of the token that filled the mask, by the law it was drawn from: temperature, top-k and top-p
    applied. 0 in the prompt."""
    entropy: Float[np.ndarray, " positions"]
    """Of that law; 0 in the prompt."""
    edits: Int[np.ndarray, "edits 4"]
    """Step of the block, position, old token, new token; in the order in which they were made."""
    edit_logp: Float[np.ndarray, " edits"]
    """Log-probability of the new token, as `logp`."""
    biased: bool
    """Which positions were written depended on what was drawn, so that the sum of log p is not the log-probability
    of the actions; see `Decoder.biased`."""
    kept: Int[np.ndarray, " positions"] | None = None
    """Tokens that top-k and top-p left to draw the position's token from; 0 in the prompt. None where the sampler has
    neither."""

    @property
    def filled(self) -> Int[np.ndarray, " positions"]:
        """The tokens that filled the masks, before any edit."""
        tokens = self.tokens.copy()
        for _, position, old, _ in self.edits[::-1]:
            tokens[position] = old
        return tokens

    def behind(self, prompt: Sequence[int]) -> "Trajectory":
        """The same actions behind another prompt, whose blocks must end where those of its own did. Log p and entropy
        stay what they were."""
        moved, first = len(prompt) - self.prompt, self.prompt

        def shifted(array: np.ndarray, begin: np.ndarray) -> np.ndarray:
            return np.concatenate([begin.astype(array.dtype), array[first:]])

        nothing = np.zeros(len(prompt))
        return replace(
            self,
            tokens=shifted(self.tokens, np.array(prompt)),
            prompt=len(prompt),
            step=shifted(self.step, nothing - 1),
            logp=shifted(self.logp, nothing),
            entropy=shifted(self.entropy, nothing),
            edits=self.edits + np.array([0, moved, 0, 0]),
            kept=None if self.kept is None else shifted(self.kept, nothing),
        )


RECORDED = ("write", "masked", "old", "new", "logp", "entropy")
"""What of each step is kept."""


class Recorder:
    """The trajectory of a row while it is written."""

    def __init__(self, capacity: int, biased: bool) -> None:
        """`capacity`: positions of the document in whole blocks."""
        self.capacity, self.biased = capacity, biased
        self._taken: list[tuple[int, int, dict[str, np.ndarray], int]] = []
        """Of each step its number in the block, the block's start, the canvas before and after, and the row in it: what
        it means is found out once, when all is written."""
        self._steps = 0
        """Steps that the active block has had."""

    def add(self, start: int, canvas: dict[str, np.ndarray], row: int, final: bool) -> None:
        """One step of the block at `start`: arrays by row and by position in the block, which stay as they are."""
        self._taken.append((self._steps, start, canvas, row))
        self._steps = 0 if final else self._steps + 1

    def trajectory(self, tokens: Sequence[int], prompt: int) -> Trajectory:
        """Of the final blocks, which hold `tokens`."""
        end, step = len(tokens), np.full(self.capacity, -1, dtype=np.int64)
        logp, entropy = np.zeros(self.capacity), np.zeros(self.capacity)
        edits, edit_logp = np.zeros((0, 4), dtype=np.int64), np.zeros(0)
        kept = np.zeros(self.capacity, dtype=np.int64)
        if self._taken:
            numbers, starts = (np.array(column, dtype=np.int64) for column in list(zip(*self._taken, strict=True))[:2])
            each = {name: np.stack([canvas[name][row] for _, _, canvas, row in self._taken]) for name in RECORDED}
            taken, place = (each["write"] & each["masked"]).nonzero()
            position = starts[taken] + place
            step[position] = numbers[taken]
            logp[position], entropy[position] = each["logp"][taken, place], each["entropy"][taken, place]
            if any("kept" in canvas for _, _, canvas, _ in self._taken):  # 0 of a row without filters beside others
                none = np.zeros_like(each["old"][0])
                left = np.stack(
                    [canvas["kept"][row] if "kept" in canvas else none for _, _, canvas, row in self._taken]
                )
                kept[position] = left[taken, place]
            taken, place = (each["write"] & ~each["masked"]).nonzero()
            columns = (numbers[taken], starts[taken] + place, each["old"][taken, place], each["new"][taken, place])
            edits, edit_logp = np.stack(columns, -1), each["logp"][taken, place]
        return Trajectory(
            np.array(tokens, dtype=np.int64),
            prompt,
            step[:end].copy(),
            logp[:end].copy(),
            entropy[:end].copy(),
            edits,
            edit_logp,
            self.biased,
            kept[:end].copy() if kept.any() else None,
        )


def record(rows: Sequence[tuple[Recorder | None, int]], canvas: Canvas, edit: Edit, chances: Chances) -> None:
    """Tell the recorders what an edit writes; `rows` have one, or None, and where the active block starts."""
    arrays = {
        name: tensor.cpu().numpy()
        for name, tensor in {
            "write": edit.write,
            "masked": canvas.masked,
            "old": canvas.tokens,
            "new": edit.tokens,
            "logp": chances.logp,
            "entropy": chances.entropy,
            **({} if chances.kept is None else {"kept": chances.kept}),
        }.items()
    }
    for number, ((recorder, start), final) in enumerate(zip(rows, edit.final.tolist(), strict=True)):
        if recorder is not None:
            recorder.add(start, arrays, number, final)


def recorder_for(decoder: object, capacity: int) -> Recorder:
    """For a row of `capacity` positions that `decoder` writes. Raises as `check_recordable`."""
    return Recorder(capacity, check_recordable(decoder).biased)


def check_recordable(decoder: object) -> Decoder:
    """The decoder. Raises `ConfigError` for one whose text has no trajectory: not that of a diffusion model (give None
    where another model writes), one whose tokens no single law describes, or one that edits finished blocks."""
    if not isinstance(decoder, Decoder):
        raise ConfigError(
            "a trajectory was asked for of a text that no diffusion model writes by steps of blocks",
            "leave out trajectory, or what asks for the parent, exact mode or scores",
        )
    name = type(decoder).__name__
    if decoder.sampling is None:
        raise ConfigError(
            f"{name} has no trajectory: no single distribution describes the tokens it writes",
            "take another decoder, such as ordered",
        )
    if decoder.window > 0:
        raise ConfigError(
            f"{name} with window {decoder.window} has no trajectory: a finished block would change later",
            "give window 0",
        )
    return decoder
