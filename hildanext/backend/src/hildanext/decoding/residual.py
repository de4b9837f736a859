"""Residual context: what the model thought of a mask that stays a mask is fed in its place."""

import hashlib
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.core.errors import ConfigError
from hildanext.decoding.base import Canvas, Edit, Sampling
from hildanext.decoding.threshold_edit import ThresholdEdit
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.soft_inputs import InputTable, Likely, SoftInputs, likely, mixture, normalized_entropy

logger = logging.getLogger(__name__)

ROWS = 8
"""Rows of logits at once: a few stay in a processor's cache from one pass over them to the next."""


class _Kept(NamedTuple):
    """What is remembered of a row's block."""

    rule: Any
    """The memory of the rule of filling."""
    weight: Float[Tensor, " block"]
    """Of the residuals, 0 where there is none."""
    ids: Int[Tensor, "block kept"] | None
    """The tokens of the residuals; None: all ids, in order."""
    probability: Float[Tensor, "block kept"]


@config
class Residual(ThresholdEdit):
    """`threshold_edit`, whose masks are fed with what the last forward of the block thought of them.

    With alpha the entropy of a mask's distribution over log V, and delta the mean input embedding of its tokens, a mask
    that stays one is fed next as (1 - lam alpha) of its own embedding and lam alpha of delta. Written tokens, and all
    that is not in the active block, are fed as ever, so that what a cache holds is exact. A position that is written
    forgets its residual, a block begins without any.

    Paper: Residual Context Diffusion, arXiv:2601.22954v2, Alg. 2.
    Differs: `lam`, and mixtures of the `top` likeliest tokens, renormalised, are ours; log V counts the tokens that can
    be emitted; the paper names a start from a Dirichlet distribution and not its concentration: 1 here. It has no
    editing: an edited token has no residual. The authors' code was not read.
    """

    research: ClassVar[bool] = True

    lam: float = Field(title="Share of the residual", default=1.0, ge=0, le=1, allow_inf_nan=False)
    """Times alpha: 1 is the paper's, 0 is threshold_edit."""
    t_res: float = Field(title="Temperature of alpha", default=1.0, gt=0, le=100, allow_inf_nan=False)
    """Of the distribution whose entropy is alpha; that of delta has 1."""
    top: int = Field(title="Tokens of a residual", default=64, ge=0, le=2147483648)
    """Likeliest tokens that a residual is the mean of, renormalised; 0 is all of them."""
    start: Literal["zero", "dirichlet"] = "zero"
    """What a block begins with: plain masks, or residuals of distributions drawn from the row's seed."""
    untrained: bool = False
    """Whether a checkpoint may be decoded so that was not trained with residuals. Its text is then worse."""

    __hash__ = ThresholdEdit.__hash__  # a section is no key of a dict

    @property
    def sampling(self) -> Sampling | None:
        """None where residuals are fed: a law that is read off the written tokens alone does not describe it."""
        return super().sampling if self.lam == 0.0 else None

    def check_model(self, model: DiffusionModel) -> None:
        if self.lam == 0.0:
            return
        if not model.takes_embeddings:
            raise ConfigError(
                "residual feeds mixtures of embeddings, and the graph of ONNX Runtime takes tokens",
                "leave the runtime and q8 or q4 out, or take threshold_edit",
            )
        if model.card.residual is not None:
            return
        if not self.untrained:
            raise ConfigError(
                "residual on a checkpoint that was not trained with residuals",
                "convert or fine-tune one with the setting residual, or say untrained: true (its text is then worse)",
            )
        logger.warning("residuals are fed to a checkpoint that was not trained with them: its text is worse")

    def soft(self, canvas: Canvas, input_table: Callable[[], InputTable]) -> SoftInputs | None:
        fresh = not any(memory is not None for memory in canvas.memory)
        if self.lam == 0.0 or (fresh and self.start == "zero"):
            return None
        table = input_table()
        weight, ids, probability = self._fed(canvas, table)
        at = canvas.read(canvas.masked)
        states = torch.zeros(*at.shape, table.rows.shape[1], dtype=table.rows.dtype, device=table.rows.device)
        mean = mixture(table.rows, Likely(None if ids is None else ids[at], probability[at]))
        return SoftInputs(weight, states.masked_scatter(at[..., None], mean.to(states.dtype)))

    def edit(self, logits: Float[Tensor, "rows vocab"], where: Bool[Tensor, "batch block"], canvas: Canvas) -> Edit:
        if self.lam == 0.0:
            return super().edit(logits, where, canvas)
        of_rule = tuple(None if row is None else row.rule for row in canvas.memory)
        edit = super().edit(logits, where, canvas.with_memory(of_rule))
        still = canvas.masked & ~edit.write
        at = still if still.device.type == "cpu" else where
        weight, tokens = self._residuals(logits, None if at is where else at[canvas.places(where)].nonzero()[:, 0])
        nothing = torch.zeros(*at.shape, tokens.probability.shape[1], dtype=logits.dtype, device=logits.device)
        probability = nothing.masked_scatter(at[..., None], tokens.probability)
        ids = [None] * len(at) if tokens.ids is None else nothing.long().masked_scatter(at[..., None], tokens.ids)
        weight = torch.zeros(at.shape, dtype=logits.dtype, device=logits.device).masked_scatter(at, weight)
        weight = weight.masked_fill(~still, 0.0)
        rule = edit.memory if edit.memory else (None,) * len(at)
        return replace(edit, memory=tuple(map(_Kept, rule, weight, ids, probability)))

    def _residuals(
        self, logits: Float[Tensor, "rows vocab"], chosen: Int[Tensor, " masks"] | None = None
    ) -> tuple[Float[Tensor, " masks"], Likely]:
        """Of the chosen rows, None: of all of them."""
        parts = (logits,) if chosen is None else (logits[rows] for rows in chosen.split(ROWS))
        made = [(self.lam * normalized_entropy(part, self.t_res), likely(part, self.top)) for part in parts]
        ids = [tokens.ids for _, tokens in made if tokens.ids is not None]
        probability = torch.cat([tokens.probability for _, tokens in made])
        return torch.cat([weight for weight, _ in made]), Likely(torch.cat(ids) if ids else None, probability)

    def _fed(self, canvas: Canvas, table: InputTable) -> tuple[Tensor, Tensor | None, Tensor]:
        """Weight, ids and probabilities of every position, of rows at their block's first step those of its start."""
        memory = canvas.memory if canvas.memory else (None,) * len(canvas.tokens)
        kept = [row if row is not None else self._start(canvas, number, table) for number, row in enumerate(memory)]
        ids = [row.ids for row in kept if row.ids is not None]
        weight, probability = torch.stack([row.weight for row in kept]), torch.stack([row.probability for row in kept])
        return weight, torch.stack(ids) if ids else None, probability

    def _start(self, canvas: Canvas, number: int, table: InputTable) -> _Kept:
        size, vocab = canvas.masked.shape[1], len(table.banned)
        dtype = torch.float64 if table.rows.dtype == torch.float64 else torch.float32
        if self.start == "dirichlet":
            assert canvas.rows, "a canvas without the seeds of its rows has no start that is drawn"
            row = canvas.rows[number]
            drawn = _exponentials(row.seed, row.start, size, vocab).to(table.rows.device, dtype)
            weight, tokens = self._residuals(drawn.log().masked_fill(table.banned, -math.inf))
            return _Kept(None, weight, *tokens)
        width = vocab if self.top == 0 else min(self.top, vocab)
        nothing = torch.zeros(size, width, dtype=dtype, device=table.rows.device)
        return _Kept(None, nothing[:, 0], None if self.top == 0 else nothing.long(), nothing)


def _exponentials(seed: int, start: int, size: int, vocab: int) -> Float[Tensor, "block vocab"]:
    """Draws for the block at `start`: over their sum they are of a Dirichlet distribution of concentration 1. Hashed,
    so that the seeds of tokens (`SequenceState.uniform`) are others; on the CPU, the same everywhere."""
    digest = hashlib.sha256(f"residuals of the block at {start}, seed {seed}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(size, vocab, dtype=torch.float64).exponential_(generator=generator)
