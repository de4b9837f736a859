"""What exact mode is to give: the acceptance that a card of draft adapters tells, and what rows cost on a device.

A rate is measured (`decoding/exact/costs.py`: in the cache folder where exact mode has run here before) or declared.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from hildanext.core.errors import CheckpointError
from hildanext.core.runtime import RuntimeConfig
from hildanext.decoding.exact.costs import stored_costs
from hildanext.decoding.exact.expected import (
    Placement,
    fastest,
    seconds_per_forward,
    tokens_per_forward,
)
from hildanext.memory_plan.architecture import Architecture
from hildanext.memory_plan.step import weights_bytes
from hildanext.models.draft_card import DraftCard

HALF = 2
"""Bytes of a weight in fp16."""
GTX_1080_BYTES = 320e9
"""A second, by its data sheet: what reads the weights once for a token at best."""
SMOLLM2 = ("llama", 576, 30)
"""Family, hidden size and layers of SmolLM2-135M, on which absolute times were measured."""


@dataclass(frozen=True)
class Rate:
    """What a forward costs by its rows, in units of a forward of one row; its seconds where they are known."""

    name: str
    source: str
    cost: Callable[[int], float]
    one_row_seconds: float | None = None


@dataclass(frozen=True)
class Expected:
    """The placement with the most tokens a second at one rate, and what it gives over a long text."""

    rate: Rate
    placement: Placement
    tokens_per_forward: float
    rows: float
    """Of a forward, in the mean."""
    times_parent: float

    @property
    def tokens_per_second(self) -> float | None:
        """None where the seconds of a forward are not known for this model."""
        seconds = self.rate.one_row_seconds
        return None if seconds is None else self.times_parent / seconds

    def record(self) -> dict[str, Any]:
        return {
            "device": self.rate.name, "source": self.rate.source, "drafts": self.placement.drafts,
            "points": list(self.placement.points), "tokens_per_forward": self.tokens_per_forward,
            "rows_per_forward": self.rows, "times_parent": self.times_parent,
            "tokens_per_second": self.tokens_per_second,
        }  # fmt: skip


def expected(card: DraftCard, shape: Architecture, runtime: RuntimeConfig) -> list[Expected]:
    """One line for each rate, this device's own first where it is known.

    Raises `CheckpointError` for a card that does not say how often its drafts were right.
    """
    if not card.acceptance:
        raise CheckpointError(
            "the card of these adapters has no acceptance", "train them to a validation: hildanext convert measures it"
        )
    here = _measured(card, shape, runtime)
    return [_expected(rate, card) for rate in ([here] if here is not None else []) + declared(shape)]


def declared(shape: Architecture) -> list[Rate]:
    """Rates that were measured elsewhere or stand in a data sheet; seconds for the model they belong to alone."""
    own = (shape.family, shape.hidden, shape.layers) == SMOLLM2
    card_seconds = weights_bytes(shape, False, HALF) / GTX_1080_BYTES
    return [
        Rate(
            "torch bf16, CPU", "declared: 26 ms + 0.66 a row (SmolLM2-135M)", _line(0.66 / 26), 0.026 if own else None
        ),
        Rate("8 bits, two cores", "declared: + 0.105 of a one-row forward a row", _line(0.105)),
        Rate("8 bits, one core", "declared: + 0.15 of a one-row forward a row", _line(0.15)),
        Rate("GTX 1080", "data sheet: + 0.02 a row; weights in fp16 at 320 GB/s at best", _line(0.02), card_seconds),
    ]


def _line(share: float) -> Callable[[int], float]:
    return lambda rows: 1.0 + share * (rows - 1)


def _measured(card: DraftCard, shape: Architecture, runtime: RuntimeConfig) -> Rate | None:
    """What exact mode measured on this device for a parent of this shape and adapters like these."""
    here = runtime.resolve()
    config = SimpleNamespace(
        hidden_size=shape.hidden, intermediate_size=shape.inner, num_hidden_layers=shape.layers, vocab_size=shape.vocab
    )
    costs = stored_costs(config, here, card.costs)
    if costs is None:
        return None
    one = costs(1)
    dtype = str(here.dtype).removeprefix("torch.")
    name = f"here: {dtype} on {here.device}, {here.threads} threads"
    return Rate(name, "measured", lambda rows: costs(rows) / one, one)


def _expected(rate: Rate, card: DraftCard) -> Expected:
    right = card.acceptance
    placement = fastest(card.places, right, rate.cost)
    tokens = tokens_per_forward(placement, right)
    seconds = seconds_per_forward(placement, right, rate.cost)
    return Expected(rate, placement, tokens, _rows(placement, right), tokens / seconds)


def _rows(placement: Placement, right: tuple[float, ...]) -> float:
    """Of a forward in the mean: the seconds of a forward that costs a second a row."""
    return seconds_per_forward(placement, right, float)
