"""What a forward costs by its rows: by a table, and as the steps of this process show it."""

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence

RECENT = 9
"""Steps whose median is the machine's pace."""
COMPARED = 5
"""Comparisons of a size with others whose median it goes by."""
ENOUGH = 3
"""Steps that a pace is made of, before anything is compared with it."""
TRIED = 3
"""Steps of a size after which its cost is known: the median is none of a disturbed one's."""
DOUBT = 1.5
"""A size that is not known may cost this many times what is believed, or as many times less."""
CHEAPEST = 1 / 3
"""What rows cost beside the parent's is at least this share of what the table says: in a machine's quick moments an
account would gain by drafts that are wrong."""
NEAR = 2
"""Quarters of an octave within which a size is known by another one."""
STALE = 96
"""Steps after which the parent's own is looked at again."""
FORGOTTEN = 384
"""Steps after which what other sizes have shown is to be asked again."""


class RowCosts:
    """Seconds of a forward by its number of rows, measured at some and interpolated between them."""

    def __init__(self, measured: Mapping[int, float]) -> None:
        self.rows = sorted(measured)
        self.seconds = [measured[rows] for rows in self.rows]

    @property
    def table(self) -> "RowCosts":
        """What was measured, whatever has been seen since."""
        return self

    def __call__(self, rows: int) -> float:
        """By the table."""
        at = min(max(bisect_left(self.rows, rows), 1), len(self.rows) - 1)
        low, high = self.rows[at - 1], self.rows[at]
        slope = (self.seconds[at] - self.seconds[at - 1]) / (high - low)
        return self.seconds[at - 1] + slope * (rows - low)

    def price(self, fed: int, documents: int = 1) -> float:
        """A forward of `fed` rows for each of `documents`, in forwards of the parent for as many."""
        return self(fed * documents) / self(documents)

    def most(self, fed: int, documents: int = 1) -> float:
        """The price that is to be reckoned with; a table is believed."""
        return self.price(fed, documents)

    def least(self, fed: int, documents: int = 1) -> float:
        """The price that may be hoped for."""
        return self.price(fed, documents)

    def knows(self, fed: int, documents: int = 1) -> bool:
        """Whether that price is no guess."""
        return True

    def asks_for_parent(self, documents: int = 1) -> bool:
        """Whether the parent's own forward is to be seen before others are compared with it."""
        return False

    def note(self, documents: int, rows: int, seconds: float) -> None:
        """A forward of `rows` rows in all, of `documents`, took so long."""


class RunningCosts(RowCosts):
    """A table of costs, corrected by the steps that are made: how quick the machine is now, and how dear each size is
    beside the others.

    What a step took over what the table and its size's correction say is a sample of the machine's pace, the median of
    the last `RECENT`. Another size than most of these is compared with that pace, and the median of its comparisons is
    its correction. So a machine that slows down makes no size dear, a disturbed step moves no median, and a size that
    nobody has seen goes by its neighbours. Sizes are quarters of an octave of rows for each document, apart by the
    magnitude of documents: what several documents take is not what one takes with as many rows.
    """

    def __init__(self, table: RowCosts) -> None:
        super().__init__(dict(zip(table.rows, table.seconds, strict=True)))
        self._table = table
        self.steps = 0
        self.pace = 1.0
        self._recent: deque[tuple[_Size, float]] = deque(maxlen=RECENT)
        self._corrections: dict[_Size, float] = {}
        self._compared: dict[_Size, deque[float]] = {}
        self._seen: dict[_Size, int] = {}
        self._last: dict[_Size, int] = {}
        self._prices: dict[tuple[int, int], float] = {}

    @property
    def table(self) -> RowCosts:
        return self._table

    def price(self, fed: int, documents: int = 1) -> float:
        key = fed, documents
        if key not in self._prices:
            of_table = super().price(fed, documents)
            own, parents = _size(documents, fed * documents), _size(documents, documents)
            price = of_table * self._correction(own) / self._correction(parents)
            self._prices[key] = max(price, 1.0 + CHEAPEST * (of_table - 1.0))
        return self._prices[key]

    def most(self, fed: int, documents: int = 1) -> float:
        price = self.price(fed, documents)
        if self.knows(fed, documents):
            return price
        size = _size(documents, fed * documents)
        seen = self._compared.get(size)  # too few samples are no proof, and no worse than none
        return price * (min(max(max(seen) / self._correction(size), 1.0), DOUBT) if seen else DOUBT)

    def least(self, fed: int, documents: int = 1) -> float:
        price = self.price(fed, documents)
        return price if self.knows(fed, documents) else min(price, max(1.0, price / DOUBT))

    def knows(self, fed: int, documents: int = 1) -> bool:
        """Whether it, or a size that is near, has been seen often enough of late."""
        magnitude, at = _size(documents, fed * documents)
        if at == 0 or self._fresh((magnitude, at)):
            return True
        near = ((magnitude, other) for other in range(at - NEAR, at + NEAR + 1) if other)
        return not self._compared.get((magnitude, at)) and any(map(self._fresh, near))

    def asks_for_parent(self, documents: int = 1) -> bool:
        size = _size(documents, documents)
        return self._seen.get(size, 0) < ENOUGH or self.steps - self._last[size] > STALE

    def note(self, documents: int, rows: int, seconds: float) -> None:
        size, of_table = _size(documents, rows), seconds / self(rows)
        if not self._corrections:
            self._corrections[size] = 1.0  # the others are compared with it
        if self.steps - self._last.get(size, self.steps) > FORGOTTEN:
            self._seen[size] = 0
            self._compared.pop(size, None)
            self._prices.clear()
        others = sum(other != size for other, _ in self._recent)
        if len(self._recent) >= ENOUGH and 2 * others >= len(self._recent):
            self._compare(size, of_table / self.pace)
        self._recent.append((size, of_table / self._correction(size)))
        self.pace = _median([sample for _, sample in self._recent])
        self.steps += 1
        self._seen[size], self._last[size] = self._seen.get(size, 0) + 1, self.steps

    def _compare(self, size: "_Size", sample: float) -> None:
        samples = self._compared.setdefault(size, deque(maxlen=COMPARED))
        samples.append(sample)
        if len(samples) >= TRIED:
            self._corrections[size] = _median(samples)
        self._prices.clear()

    def _fresh(self, size: "_Size") -> bool:
        return (
            size in self._corrections
            and self._seen.get(size, 0) >= TRIED
            and self.steps - self._last[size] <= FORGOTTEN
        )

    def _correction(self, size: "_Size") -> float:
        """Its own; or by the sizes next to it, of the nearest magnitude of documents that has any."""
        if size in self._corrections or not self._corrections:
            return self._corrections.get(size, 1.0)
        nearest = min({magnitude for magnitude, _ in self._corrections}, key=lambda other: abs(other - size[0]))
        of = {at: correction for (magnitude, at), correction in self._corrections.items() if magnitude == nearest}
        low = max((at for at in of if at <= size[1]), default=min(of))
        high = min((at for at in of if at >= size[1]), default=max(of))
        share = 0.0 if low >= high else (size[1] - low) / (high - low)
        return of[low] + share * (of[high] - of[low])


_Size = tuple[int, int]


def _size(documents: int, rows: int) -> _Size:
    """The magnitude of `documents`, and quarters of an octave of the rows that each of them has."""
    return documents.bit_length(), round(4 * math.log2(rows / documents))


def _median(values: Sequence[float]) -> float:
    """The lower one of an even number."""
    return sorted(values)[(len(values) - 1) // 2]
