"""Supervised losses. To add one: write the file, add its row, add its case.

Read `base` (a loss is a weight for each token, but for `c2dlm`, a loss on the forward's attention), `mask_to_token` and
`token_to_token`, then `objective`: one backbone forward for all of them, and one call of the head for those that read
the same stream, in chunks by `linear_cross_entropy`. Only `ar` reads the clean stream: with it there are two calls.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hildanext.core.errors import ConfigError
from hildanext.core.registry import build
from hildanext.losses.autoregressive import Autoregressive
from hildanext.losses.base import TokenLoss, Weights
from hildanext.losses.c2dlm import CausalAttention
from hildanext.losses.confidence import ConfidenceAware
from hildanext.losses.distillation import ParentDistillation
from hildanext.losses.mask_to_token import MaskToToken
from hildanext.losses.objective import SupervisedStep
from hildanext.losses.representation import RepresentationAlignment
from hildanext.losses.step import Outcome, TrainingStep
from hildanext.losses.token_to_token import TokenToToken

LOSSES: dict[str, type[TokenLoss]] = {
    "m2t": MaskToToken,
    "t2t": TokenToToken,
    "ar": Autoregressive,
    "kl": ParentDistillation,
    "align": RepresentationAlignment,
    "cap": ConfidenceAware,
    "c2dlm": CausalAttention,
}


def make_losses(sections: Sequence[Mapping[str, Any]], where: str) -> dict[str, TokenLoss]:
    """The losses of a stage by name. Raises `ConfigError` for none, two of a name, or a wrong knob."""
    losses = {str(section.get("name")): build("loss", LOSSES, section) for section in sections}
    if len(losses) != len(sections) or not losses:
        raise ConfigError(where, "list at least one loss, each name once")
    return losses


__all__ = ["LOSSES", "Outcome", "TokenLoss", "SupervisedStep", "TrainingStep", "Weights", "make_losses"]
