"""Which way to place masks pays: the measured cost of a forward's rows against the acceptance seen so far.

No choice may lose more than `LOSS` of what the parent alone would have taken: each row keeps an account, in forwards of
the parent, of what drafting has won it, and a placement is affordable where even a forward that writes a single token
leaves the account above the limit. A size whose cost is a guess is reckoned as dear as it may be, and booked once it is
known.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from hildanext.core.config import config
from hildanext.core.errors import ConfigError
from hildanext.decoding.exact.expected import PARENT, Placement, all_points, fastest, last_point
from hildanext.decoding.exact.row_costs import RowCosts

if TYPE_CHECKING:
    from hildanext.decoding.exact.state import ExactRow

TRUST = 8
"""Forwards that what was seen before a text counts for, beside what the text itself shows."""
MEMORY = 200
"""Forwards of other texts that are remembered; the card counts for `TRUST` of them. Where a text is written, drafts
follow places at which the one before was wrong more often than those that the card was measured at."""
EVERY = 8
"""Forwards of a row between two choices."""
PROBE = 48
"""Where drafts do not pay, one forward in so many drafts all the same, to notice a text that becomes easier; at the
beginning of a text only while few texts have shown anything."""
TRIALS = 4
"""Forwards of a placement that is tried for what its rows cost: one may have no drafts yet, three tell the cost."""
LOSS = 0.025
"""Share of the parent's time that drafting may cost by the costs of rows; what they do not see comes on top."""
HORIZON = 64
"""Tokens whose share may be spent before they are written; of a shorter text what it is allowed."""
TRIES = 3
"""Drafts of a text that may all be wrong before it has no more to spend: its first forward has none to confirm, and one
wrong guess at a text's beginning says little of the rest."""
TRUSTED = 2
"""Forwards of a text, of a size that is not known, that are reckoned with as it is believed: with more doubt a text's
first step that drafts, which has no drafts to confirm yet, would empty its account, and it would never draft again."""
NGRAM_DRAFTS = 6
"""Tokens that are looked up at a time where there are no adapters and nobody says."""
MOST_DRAFTS = 16
GUESS = 0.5
"""The chance that is assumed of the next looked-up token, given that those before it were right."""


@config
class ExactConfig:
    """Knobs of exact decoding."""

    after: Literal["auto", "all", "last"] = "auto"
    """Where masks stand: behind every acceptance point, behind the last draft, or where it pays on this device."""
    drafter: Literal["adapters", "ngram", "both", "none"] = "adapters"
    """Who drafts: the checkpoint's adapters, a look-up in the text so far, the look-up where it finds something and
    else the adapters, or nobody (the parent alone; with fixed rows in forwards of the adapters' shape)."""
    drafts: int | None = Field(default=None, ge=1, le=MOST_DRAFTS)
    """Tokens that are drafted at a time, at most; None: what the checkpoint has learnt, of ngram alone 6."""
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False, json_schema_extra={"request_maximum": 100})
    """0 writes the parent's greedy text."""
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    """Draw from the likeliest tokens that hold this probability together; None is all of them."""
    top_k: int | None = Field(default=None, ge=1, le=2147483648)
    """Draw from this many of the likeliest tokens; None is all of them."""
    fixed_rows: bool | None = None
    """Feed the same number of rows in every forward of a request, junk where there are no drafts. In 16-bit types a
    row's numbers depend on how many are fed with it; so the text is what the parent writes at that number of rows.
    None: on in 16-bit types, off in others."""
    sample_drafts: bool = False
    """Draw drafts from the adapters' distribution; else they are its likeliest tokens. The text's law is the same. A
    seed then gives another text with other drafts."""

    def __post_init__(self) -> None:
        if not self.sample_drafts:
            return
        if not self.uses_adapters:
            raise ConfigError(f"sample_drafts is about adapters, and the drafter is {self.drafter!r}", "leave it out")
        if self.temperature <= 0:
            raise ConfigError("sample_drafts at temperature 0 draws nothing", "give a temperature, or leave it out")
        if self.after == "auto":
            raise ConfigError(
                "sample_drafts under after 'auto': a seed would give another text on another device",
                "give after: all or last",
            )

    @property
    def uses_adapters(self) -> bool:
        return self.drafter in ("adapters", "both")


class Placing:
    """Chooses a placement for each row and forward."""

    def __init__(
        self, config: ExactConfig, most: int, acceptance: tuple[float, ...] = (), costs: RowCosts | None = None
    ) -> None:
        """`acceptance[j - 1]` is the card's share of places at which the first j drafts were right."""
        self.config = config
        self.most = 0 if config.drafter == "none" and not config.fixed_rows else most
        self.acceptance = acceptance if config.uses_adapters else tuple(GUESS**place for place in range(1, most + 1))
        self.fixed = bool(config.fixed_rows)
        # With fixed rows a text depends on their number, and so on costs: no text is to depend on earlier ones.
        self.costs = costs.table if costs is not None and self.fixed else costs
        self._offered, self._confirmed = [0.0] * most, [0.0] * most

    def choose(self, row: "ExactRow", rows: int = 1) -> Placement:
        """For a row's next forward, which `rows` rows share."""
        if self.most == 0:
            return PARENT
        if self.config.after != "auto" or self.costs is None:
            if self.config.drafter == "ngram":
                return Placement(self.most, ())
            return last_point(self.most) if self.config.after == "last" else all_points(self.most)
        if self.fixed:  # chosen once: the number of rows decides which numbers the parent computes
            if row.placement is None:
                row.placement = self._fastest(row, 1, afford=False)
            return row.placement
        if self.costs.asks_for_parent(rows):
            return PARENT
        chosen = self._chosen(row, rows)
        probe = last_point(1) if self.config.uses_adapters else Placement(1, ())
        asks = row.forwards % PROBE < 2 and (row.forwards >= PROBE or self._offered[0] < TRUST)
        if chosen.drafts == 0 and asks and self._affords(row, probe, rows):
            return probe
        return chosen

    def note(self, row: "ExactRow", fed: int, written: int, rows: int = 1) -> None:
        """A forward that `rows` rows shared fed `fed` rows of this one and wrote `written` tokens of it."""
        if self.costs is None:
            return
        row.won += written
        row.unpaid[fed, rows] = row.unpaid.get((fed, rows), 0) + 1
        for known in [key for key in row.unpaid if self.costs.knows(*key)]:
            row.won -= row.unpaid.pop(known) * self.costs.price(*known)

    def took(self, rows: int, fed: int, seconds: float) -> None:
        """A forward that `rows` rows shared fed `fed` rows in all."""
        if self.costs is not None:
            self.costs.note(rows, fed, seconds)

    def verdict(self, given: int, accepted: int) -> None:
        """Of `given` drafts of some text the first `accepted` were right."""
        if given and self._offered[0] >= MEMORY:
            self._offered = [0.5 * count for count in self._offered]
            self._confirmed = [0.5 * count for count in self._confirmed]
        for place in range(min(given, self.most)):
            self._offered[place] += 1
            self._confirmed[place] += place < accepted

    def right(self, row: "ExactRow") -> list[float]:
        """The chance that the first j drafts are right, j from 1: the card's, then that of all texts so far, then the
        row's own. With fixed rows the card's alone, so that no text depends on another."""
        chances = []
        for place in range(self.most):
            prior = self.acceptance[place] if place < len(self.acceptance) else 0.0
            if not self.fixed:
                prior = (TRUST * prior + self._confirmed[place]) / (TRUST + self._offered[place])
            offered = row.offered[place] if place < len(row.offered) else 0
            confirmed = row.confirmed[place] if place < len(row.confirmed) else 0
            chances.append((TRUST * prior + confirmed) / (TRUST + offered))
        return chances

    def _chosen(self, row: "ExactRow", rows: int) -> Placement:
        """What the row goes on with. Where a choice is due it is what may be hoped to be the fastest: for as long as it
        is known to cost what it costs, or for a trial, after which what is believed counts."""
        assert self.costs is not None
        tried = row.trials == 1
        row.trials = max(row.trials - 1, 0)
        due = tried or row.placement is None or (row.trials == 0 and row.forwards % EVERY == 0)
        if not due and self._affords(row, row.placement or PARENT, rows):
            return row.placement or PARENT
        chosen = self._fastest(row, rows, hoped=not tried)
        known = all(self.costs.knows(fed, rows) for fed in (chosen.rows, chosen.rows_without))
        row.placement, row.trials = chosen, 0 if known or tried else TRIALS
        return chosen

    def won(self, row: "ExactRow") -> float:
        """The row's account, in forwards of the parent; what is not known yet counts as it is believed, and soon
        as dear as it may have been."""
        assert self.costs is not None
        trusted = {key: min(count, TRUSTED) for key, count in row.unpaid.items()}
        believed = sum(count * self.costs.price(*key) for key, count in trusted.items())
        return row.won - believed - sum((row.unpaid[key] - trusted[key]) * self.costs.most(*key) for key in trusted)

    def _affords(self, row: "ExactRow", placement: Placement, rows: int) -> bool:
        """Whether the row may lose what this placement loses where all its drafts are wrong."""
        if placement.drafts == 0:
            return True
        assert self.costs is not None
        tokens = len(row.tokens) + 1 - row.prompt
        allowed = LOSS * max(tokens, min(HORIZON, row.limit - row.prompt))
        dearest = max(self._reckoned(row, fed, rows) for fed in (placement.rows, placement.rows_without))
        tries = max(TRIES - (row.offered[0] if row.offered else 0), 1)
        return self.won(row) - tries * (dearest - 1.0) >= -allowed

    def _reckoned(self, row: "ExactRow", fed: int, rows: int) -> float:
        """What a forward more of a size is reckoned with."""
        assert self.costs is not None
        trusted = row.unpaid.get((fed, rows), 0) < TRUSTED
        return self.costs.price(fed, rows) if trusted else self.costs.most(fed, rows)

    def _fastest(self, row: "ExactRow", rows: int, afford: bool = True, hoped: bool = False) -> Placement:
        """Of those that the row can afford; by what rows cost, or by what they may be hoped to."""
        assert self.costs is not None
        price = self.costs.least if hoped else self.costs.price
        may = (lambda placement: self._affords(row, placement, rows)) if afford else None
        return fastest(self.most, self.right(row), lambda fed: price(fed, rows), may, masks=self.config.uses_adapters)


class OnePlacement(Placing):
    """One placement for every forward, whoever asks; it may be set to another."""

    def __init__(self, config: ExactConfig, placement: Placement, most: int | None = None) -> None:
        """`most`: drafts of the largest that it is going to have."""
        super().__init__(config, placement.drafts if most is None else most)
        self.placement = placement

    def choose(self, row: "ExactRow", rows: int = 1) -> Placement:
        return self.placement
