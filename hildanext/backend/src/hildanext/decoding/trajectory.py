"""What was written of a document, as arrays: every action, when it was taken and how likely it was. Fit to learn from.

numpy alone, so that no tensor of inference mode reaches autograd.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

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


class Recorder:
    """The trajectory of a row while it is written."""

    def __init__(self, capacity: int, biased: bool) -> None:
        """`capacity`: positions of the document in whole blocks."""
        self.step = np.full(capacity, -1, dtype=np.int64)
        self.logp, self.entropy = np.zeros(capacity), np.zeros(capacity)
        self.biased = biased
        self.kept: Int[np.ndarray, " positions"] | None = None
        self._edits: list[tuple[int, int, int, int]] = []
        self._edit_logp: list[float] = []
        self._steps = 0
        """Steps that the active block has had."""

    def add(self, start: int, block: dict[str, Any], final: bool) -> None:
        """One step of the block at `start`: arrays by position in the block."""
        span = slice(start, start + len(block["filled"]))
        np.copyto(self.step[span], self._steps, where=block["filled"])
        np.copyto(self.logp[span], block["logp"], where=block["filled"])
        np.copyto(self.entropy[span], block["entropy"], where=block["filled"])
        if "kept" in block and block["kept"].any():  # a row beside filtered ones has none
            self.kept = np.zeros_like(self.step) if self.kept is None else self.kept
            np.copyto(self.kept[span], block["kept"], where=block["filled"])
        for place in block["edited"].nonzero()[0].tolist():
            self._edits.append((self._steps, start + place, int(block["old"][place]), int(block["new"][place])))
            self._edit_logp.append(float(block["logp"][place]))
        self._steps = 0 if final else self._steps + 1

    def trajectory(self, tokens: Sequence[int], prompt: int) -> Trajectory:
        """Of the final blocks, which hold `tokens`."""
        end = len(tokens)
        return Trajectory(
            np.array(tokens, dtype=np.int64),
            prompt,
            self.step[:end].copy(),
            self.logp[:end].copy(),
            self.entropy[:end].copy(),
            np.array(self._edits, dtype=np.int64).reshape(-1, 4),
            np.array(self._edit_logp, dtype=np.float64),
            self.biased,
            None if self.kept is None else self.kept[:end].copy(),
        )


def record(rows: Sequence[tuple[Recorder | None, int]], canvas: Canvas, edit: Edit, chances: Chances) -> None:
    """Tell the recorders what an edit writes; `rows` have one, or None, and where the active block starts."""
    arrays = {
        name: tensor.cpu().numpy()
        for name, tensor in {
            "filled": edit.write & canvas.masked,
            "edited": edit.write & ~canvas.masked,
            "old": canvas.tokens,
            "new": edit.tokens,
            "logp": chances.logp,
            "entropy": chances.entropy,
            "final": edit.final,
            **({} if chances.kept is None else {"kept": chances.kept}),
        }.items()
    }
    final = arrays.pop("final")
    for number, (recorder, start) in enumerate(rows):
        if recorder is not None:
            recorder.add(start, {name: array[number] for name, array in arrays.items()}, bool(final[number]))


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
