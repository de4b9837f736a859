"""Supervised losses. To add one: write the file, add its row, add its case."""

from hildanext.supervision.autoregressive import Autoregressive
from hildanext.supervision.base import Supervision, Weights
from hildanext.supervision.c2dlm import CausalAttention
from hildanext.supervision.distillation import ParentDistillation
from hildanext.supervision.mask_to_token import MaskToToken
from hildanext.supervision.objective import Outcome, SupervisedStep
from hildanext.supervision.representation import RepresentationAlignment
from hildanext.supervision.token_to_token import TokenToToken

SUPERVISIONS: dict[str, type[Supervision]] = {
    "m2t": MaskToToken,
    "t2t": TokenToToken,
    "ar": Autoregressive,
    "kl": ParentDistillation,
    "align": RepresentationAlignment,
    "c2dlm": CausalAttention,
}

__all__ = ["SUPERVISIONS", "Outcome", "Supervision", "SupervisedStep", "Weights"]
