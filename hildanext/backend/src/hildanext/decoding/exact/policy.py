"""Which way to place masks pays: the measured cost of a forward's rows against the acceptance seen so far."""

from bisect import bisect_left
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from hildanext.core.config import config
from hildanext.decoding.exact.expected import PARENT, Placement, all_points, fastest, last_point

if TYPE_CHECKING:
    from hildanext.decoding.exact.state import ExactRow

TRUST = 24
"""Forwards that the card's acceptance counts for, beside what the text itself shows."""
EVERY = 8
"""Forwards of a row between two choices."""
PROBE = 48
"""Where drafts do not pay, one forward in so many drafts all the same, to notice a text that becomes easier."""


@config
class ExactConfig:
    """Knobs of exact decoding."""

    after: Literal["auto", "all", "last"] = "auto"
    """Where masks stand: behind every acceptance point, behind the last draft, or where it pays on this device."""
    drafter: Literal["adapters", "ngram", "both", "none"] = "adapters"
    """Who drafts: the checkpoint's adapters, a look-up in the text so far, the look-up where it finds something and
    else the adapters, or nobody (the parent alone; with fixed rows in forwards of the adapters' shape)."""
    drafts: int | None = Field(default=None, ge=1)
    """Tokens that are drafted at a time, at most; None: what the checkpoint has learnt."""
    temperature: float = Field(default=0.0, ge=0)
    """0 writes the parent's greedy text."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    fixed_rows: bool | None = None
    """Feed the same number of rows in every forward of a request, junk where there are no drafts. In 16-bit types a
    row's numbers depend on how many are fed with it; so the text is what the parent writes at that number of rows.
    None: on in 16-bit types, off in others."""
    sample_drafts: bool = False
    """Draw drafts from the adapters' distribution; else they are its likeliest tokens. The text's law is the same."""


class RowCosts:
    """Seconds of a forward by its number of rows, measured at some and interpolated between them."""

    def __init__(self, measured: Mapping[int, float]) -> None:
        self.rows = sorted(measured)
        self.seconds = [measured[rows] for rows in self.rows]

    def __call__(self, rows: int) -> float:
        at = min(max(bisect_left(self.rows, rows), 1), len(self.rows) - 1)
        low, high = self.rows[at - 1], self.rows[at]
        slope = (self.seconds[at] - self.seconds[at - 1]) / (high - low)
        return self.seconds[at - 1] + slope * (rows - low)


class Placing:
    """Chooses a placement for each row and forward."""

    def __init__(
        self, config: ExactConfig, most: int, acceptance: tuple[float, ...] = (), costs: RowCosts | None = None
    ) -> None:
        """`acceptance[j - 1]` is the card's share of places at which the first j drafts were right."""
        self.config = config
        self.most = 0 if config.drafter == "none" and not config.fixed_rows else most
        self.acceptance = acceptance
        self.costs = costs
        self.fixed = bool(config.fixed_rows)
        self._chosen: dict[int, Placement] = {}

    def choose(self, row: "ExactRow", rows: int = 1) -> Placement:
        """For a row's next forward, which `rows` rows share."""
        if self.most == 0:
            return PARENT
        if self.config.drafter == "ngram":
            return Placement(self.most, ())
        if self.config.after == "last" or (self.config.after == "auto" and self.costs is None):
            return last_point(self.most) if self.config.after == "last" else all_points(self.most)
        if self.config.after == "all":
            return all_points(self.most)
        assert self.costs is not None
        number = id(row)
        if number not in self._chosen or (row.forwards % EVERY == 0 and not self.fixed):
            costs = self.costs
            self._chosen[number] = fastest(self.most, self.right(row), lambda fed: costs(fed * rows) / rows)
        chosen = self._chosen[number]
        if chosen.drafts == 0 and row.forwards % PROBE < 2 and not self.fixed:
            return last_point(1)
        return chosen

    def right(self, row: "ExactRow") -> list[float]:
        """The chance that the first j drafts are right, j from 1: the card's, then the row's own."""
        chances = []
        for place in range(self.most):
            prior = self.acceptance[place] if place < len(self.acceptance) else 0.0
            offered = row.offered[place] if place < len(row.offered) else 0
            confirmed = row.confirmed[place] if place < len(row.confirmed) else 0
            chances.append((TRUST * prior + confirmed) / (TRUST + offered))
        return chances
