"""Which tokens lie in which row. Works on document lengths alone; no token is touched here.

All documents, each rounded up to whole blocks, form one long line of blocks; a row is `blocks_per_row` of
them. A document that crosses a row's end is therefore cut at a block boundary, and its rest opens the next row.
"""

from typing import NamedTuple

import numpy as np


class Piece(NamedTuple):
    """A stretch of one document inside a row."""

    document: int
    """Index in the corpus."""
    begin: int
    end: int
    """Tokens `begin:end` of the document; real tokens only, so `end - begin` may be less than `length`."""
    length: int
    """Places taken in the row, the padding up to a whole block included."""


class Layout:
    """The rows of a corpus. One vectorised pass over the document lengths; sixteen bytes are kept per document."""

    def __init__(self, lengths: np.ndarray, sequence_length: int, block: int) -> None:
        self.lengths, self.block = lengths, block
        self.blocks_per_row = sequence_length // block
        # block at which each document begins, then the end of the last one
        self.begins = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(-(-lengths // block), out=self.begins[1:])

    def __len__(self) -> int:
        return int(-(-self.begins[-1] // self.blocks_per_row))

    def row(self, index: int) -> list[Piece]:
        """The pieces of row `index`, in order."""
        first_block, last_block = index * self.blocks_per_row, (index + 1) * self.blocks_per_row
        first = int(np.searchsorted(self.begins, first_block, side="right")) - 1
        last = int(np.searchsorted(self.begins, last_block, side="left"))
        pieces = []
        for document in range(first, min(last, len(self.lengths))):
            begin_block = max(int(self.begins[document]), first_block)
            end_block = min(int(self.begins[document + 1]), last_block)
            begin = (begin_block - int(self.begins[document])) * self.block
            places = (end_block - begin_block) * self.block
            if places:
                end = min(begin + places, int(self.lengths[document]))
                pieces.append(Piece(document, begin, end, places))
        return pieces


class WholeLayout:
    """Rows of whole documents, each into the fullest row that has room; one longer than a row is cut into rows, and its
    rest laid like a document. About 40 bytes are kept per document.
    """

    def __init__(self, lengths: np.ndarray, sequence_length: int, block: int) -> None:
        self.lengths, self.block, self.room = lengths, block, sequence_length // block * block
        pieces = np.maximum(-(-lengths // self.room), 1)
        self.document = np.repeat(np.arange(len(lengths)), pieces)
        first = np.repeat(np.cumsum(pieces) - pieces, pieces)
        self.begin = (np.arange(len(self.document)) - first) * self.room
        self.end = np.minimum(self.begin + self.room, lengths[self.document])
        blocks = -(-(self.end - self.begin) // block)
        row_of = best_fit(blocks, self.room // block)
        self.order = np.argsort(row_of, kind="stable")
        self.rows = np.searchsorted(row_of[self.order], np.arange(int(row_of.max(initial=-1)) + 2))

    def __len__(self) -> int:
        return len(self.rows) - 1

    def row(self, index: int) -> list[Piece]:
        """The pieces of row `index`, in order."""
        pieces = []
        for number in self.order[self.rows[index] : self.rows[index + 1]].tolist():
            begin, end = int(self.begin[number]), int(self.end[number])
            length = -(-(end - begin) // self.block) * self.block
            pieces.append(Piece(int(self.document[number]), begin, end, length))
        return pieces


def row_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of an epoch. Sorted raw bits: NumPy keeps those stable across versions, not `permutation`."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(rows)
    return np.argsort(bits, kind="stable")


class RowOrder:
    """Which rows make batch number k: each epoch holds every row once, in an order drawn from (seed, epoch)."""

    def __init__(self, rows: int, batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def batch(self, number: int) -> list[int]:
        """A pure function of the number, so any process can begin anywhere; a batch may span two epochs."""
        chosen = []
        for sample in range(number * self.batch_size, (number + 1) * self.batch_size):
            if sample // self.rows != self._epoch:
                self._epoch = sample // self.rows
                self._order = row_order(self.rows, self.seed, self._epoch)
            chosen.append(int(self._order[sample % self.rows]))
        return chosen


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each document so that rows of `capacity` are few: longest first, each into the fullest row it fits.

    Lengths are whole numbers from 1 to `capacity` (blocks). A million documents take about a second.
    """
    row_of = np.empty(len(lengths), dtype=np.int64)
    waiting: dict[int, list[int]] = {}
    blocks_left = 0  # bit r is set where a row with r blocks left is waiting
    rows = 0
    for document in np.argsort(-lengths, kind="stable").tolist():
        need = int(lengths[document])
        fitting = blocks_left >> need
        if fitting:
            left = need + (fitting & -fitting).bit_length() - 1
            row = waiting[left].pop()
            if not waiting[left]:
                blocks_left &= ~(1 << left)
        else:
            left, row, rows = capacity, rows, rows + 1
        row_of[document] = row
        left -= need
        if left:
            waiting.setdefault(left, []).append(row)
            blocks_left |= 1 << left
    return row_of
