"""Arrays of different lengths in two files: the values back to back, and where each array begins."""

from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

HELD = 1 << 20
"""Values held in memory before they are written."""


class RaggedWriter:
    """Appends arrays of one type; memory holds a million values and eight bytes per array."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self._file = open(folder / f"{name}.{_suffix(dtype)}", "wb")
        self._offsets_file = folder / f"{name}.offsets.u64"
        self._dtype = np.dtype(dtype)
        self._pieces: list[np.ndarray] = []
        self._held = self._end = 0
        self._offsets = array("Q", [0])

    def add(self, values: Sequence[int] | Sequence[float] | np.ndarray) -> None:
        piece = np.asarray(values).astype(self._dtype).reshape(-1)
        self._pieces.append(piece)
        self._held += piece.size
        self._end += piece.size
        self._offsets.append(self._end)
        if self._held >= HELD:
            self._write()

    def close(self) -> None:
        self._write()
        self._file.close()
        self._offsets_file.write_bytes(np.array(self._offsets, dtype="<u8").tobytes())

    def _write(self) -> None:
        for piece in self._pieces:
            self._file.write(piece.tobytes())
        self._pieces, self._held = [], 0


class Ragged:
    """Memory-mapped arrays of different lengths, as a sequence."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        values, offsets = folder / f"{name}.{_suffix(dtype)}", folder / f"{name}.offsets.u64"
        self.offsets = np.fromfile(offsets, dtype="<u8").astype(np.int64)
        empty = not values.stat().st_size  # an empty file cannot be mapped
        self.values: np.ndarray = np.empty(0, dtype) if empty else np.memmap(values, dtype, "r")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


def _suffix(dtype: str) -> str:
    """`<u4` -> `u32`, `<f4` -> `f32`, `|u1` -> `u8`."""
    return f"{dtype[1]}{8 * int(dtype[2:])}"
