"""How well a model predicts text: exact where that is possible, a bound with its standard error elsewhere.

At block size 1 one doubled forward gives the exact -log p of every token given the tokens before it, the one number
that compares with an autoregressive model. At a larger block size the number is an upper bound: inside a block it
averages over the orders in which the tokens could be revealed (BD3-LM, arXiv:2503.09573).

Every number of an evaluation is about the same tokens: maskable, and not the first of a document piece (which the
parent cannot predict; all models are given it). A training run's validation scores what its checkpoint can predict
(`diffusion.targets`): under `block` alignment the first token of a piece too, where it is maskable.

Documents are padded with EOS to whole blocks. A bound has the padding's loss in its sum but not its tokens in the
count, so that it stays a bound; the number without it stands beside it. An exact number needs no padding and leaves it
out.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from hildanext.ar import Parent
from hildanext.core.config import Seed, config
from hildanext.core.errors import UnknownChoice
from hildanext.data.batch import Batch, padding_tokens
from hildanext.diffusion import block_index
from hildanext.likelihood import LIKELIHOODS, Likelihood, Noising
from hildanext.likelihood.base import Model, number, scored_tokens, weighted_losses
from hildanext.likelihood.exact import ExactLikelihood
from hildanext.models import DiffusionModel


@config
class LikelihoodConfig:
    """How bounds are estimated, and at which block sizes."""

    estimator: str = "count"
    """A row of `LIKELIHOODS` that is a bound; all share one mean. Block size 1 is always exact."""
    draws: int = Field(default=4, ge=1)
    """Draws per block, stratified over the noise level."""
    block_sizes: tuple[int, ...] = (1, 4, 32)
    seed: Seed = 0

    def __post_init__(self) -> None:
        bounds = [name for name, member in LIKELIHOODS.items() if member.kind == "bound"]
        if self.estimator not in bounds:
            raise UnknownChoice("estimator", self.estimator, bounds)

    def at(self, block_size: int) -> Likelihood:
        if block_size == 1:
            return ExactLikelihood()
        return LIKELIHOODS[self.estimator](draws=self.draws, block_size=block_size)


@dataclass(frozen=True)
class TextLikelihood:
    """Sums over a text, in nats, and what they are divided by."""

    kind: Literal["exact", "bound"]
    block_size: int
    """1 for an exact number, the parent's too."""
    tokens: int
    """Real tokens that were predicted."""
    real_nll: float
    padding_nll: float
    """Loss of the EOS padding up to whole blocks."""
    sampling_se: float = 0.0
    """Standard error of `real_nll + padding_nll` from the random masks (not from the choice of texts)."""
    text_se: float = 0.0
    """Standard error from the choice of texts (rows), padding left out."""
    forwards: int = 0
    right: int = 0
    """Masked tokens that the model finds the most probable, of `masked`; over all draws."""
    masked: int = 0

    @property
    def nats_per_token(self) -> float:
        """Nats per real token: exact, or an honest upper bound, which the padding's loss belongs to."""
        return (self.real_nll + (self.padding_nll if self.kind == "bound" else 0.0)) / max(self.tokens, 1)

    @property
    def nats_without_padding(self) -> float:
        return self.real_nll / max(self.tokens, 1)

    @property
    def se(self) -> float:
        """Standard error of `nats_per_token` from the random masks; 0 for an exact number."""
        return self.sampling_se / max(self.tokens, 1)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats_per_token, 700.0))

    def plain(self) -> dict[str, Any]:
        """What a JSON report holds."""
        return {
            "kind": self.kind,
            "block_size": self.block_size,
            "tokens": self.tokens,
            "nats_per_token": self.nats_per_token,
            "se": self.se,
            "nats_without_padding": self.nats_without_padding,
            "perplexity": self.perplexity,
            "se_of_text": self.text_se,
            "forwards": self.forwards,
        }


class NoisedText(NamedTuple):
    """A batch, which of its tokens are scored, and how it is noised, draw by draw."""

    batch: Batch
    scored: Bool[Tensor, "batch seq"]
    noise: Iterable[Noising]


@torch.no_grad()
def text_likelihood(
    model: DiffusionModel,
    texts: Iterable[NoisedText],
    block_size: int,
    pad_id: int,
    kind: Literal["exact", "bound"] = "bound",
    chunk: int = 128,
) -> TextLikelihood:
    """-log p of the scored tokens under noise that was drawn already: what evaluation and validation share."""
    sums = _Sums()
    for batch, scored, noise in texts:
        if scored.any():
            draws = [weighted_losses(model, batch, noising, block_size, chunk) for noising in noise]
            sums.forwards += sum(draw.forwards for draw in draws)
            nll, right = torch.stack([draw.nll for draw in draws]), torch.stack([draw.right for draw in draws])
            flat = torch.cat([nll.flatten(), right.to(nll.dtype)]).to(scored.device)  # the one wait of a batch
            sums.right += int(flat[-len(draws) :].sum())
            sums.masked += sum(int(draw.masked) for draw in draws)
            blocks = block_index(batch.document, batch.position, block_size)
            padding = padding_tokens(batch.tokens, batch.document, pad_id)
            sums.add(flat[: -len(draws)].view_as(nll), scored, padding, blocks)
    return sums.likelihood(kind, block_size, "diffusion model")


def bound(
    model: DiffusionModel,
    batches: Iterable[Batch],
    block_size: int,
    pad_id: int,
    settings: LikelihoodConfig,
    chunk: int = 128,
) -> TextLikelihood:
    """Upper bound on -log p of the tokens when blocks of `block_size` are denoised one after another.

    Exact at block size 1. Every draw is one forward (two for `coupled`) that serves all blocks at once.
    """
    likelihood, generator = settings.at(block_size), torch.Generator().manual_seed(settings.seed)

    def noised(batch: Batch) -> NoisedText:
        scored, blocks = scored_tokens(batch), block_index(batch.document, batch.position, block_size)
        return NoisedText(batch, scored, likelihood.noisings(scored, blocks, generator))

    texts = (noised(batch) for batch in batches)
    return text_likelihood(model, texts, block_size, pad_id, likelihood.kind, chunk)


def exact(model: DiffusionModel, batches: Iterable[Batch], pad_id: int, chunk: int = 128) -> TextLikelihood:
    """-log p of every token given those before it."""
    return bound(model, batches, 1, pad_id, LikelihoodConfig(), chunk)


def parent_likelihood(parent: Parent, batches: Iterable[Batch], pad_id: int) -> TextLikelihood:
    """The autoregressive parent's exact number on the very same tokens."""
    sums = _Sums()
    for batch in batches:
        scored, padding = scored_tokens(batch), padding_tokens(batch.tokens, batch.document, pad_id)
        nll = parent.token_nll(batch.tokens, batch.document, batch.position).double()
        sums.add((nll * scored)[None], scored, padding, block_index(batch.document, batch.position, 1))
        sums.forwards += 1
    return sums.likelihood("exact", 1, "autoregressive parent")


class _Sums:
    """Adds up batches."""

    def __init__(self) -> None:
        self.real = self.padding = self.variance = 0.0
        self.tokens = self.forwards = self.right = self.masked = 0
        self.rows: list[tuple[float, int]] = []
        self.single: list[Tensor] = []

    def add(
        self,
        losses: Float[Tensor, "draws batch seq"],
        scored: Bool[Tensor, "batch seq"],
        padding: Bool[Tensor, "batch seq"],
        blocks: Int[Tensor, "batch seq"],
    ) -> None:
        mean = losses.mean(0)
        counted = scored & ~padding
        self.real += float(mean[counted].sum())
        self.padding += float(mean[scored & padding].sum())
        self.tokens += int(counted.sum())
        self.rows += zip((mean * counted).sum(-1).tolist(), counted.sum(-1).tolist(), strict=True)
        per_block = losses.new_zeros(len(losses), int(blocks.max()) + 1)
        per_block.index_add_(1, blocks.flatten(), losses.flatten(1))
        if len(losses) > 1:
            # Draws are stratified, hence negatively correlated: treating them as independent errs on the safe side.
            self.variance += float(per_block.var(0).sum()) / len(losses)
        else:
            self.single.append(per_block[0])

    def likelihood(self, kind: Literal["exact", "bound"], block_size: int, who: Model) -> TextLikelihood:
        if kind == "bound" and self.single:
            # One draw a block: the spread between blocks holds the texts' own spread too, so this is too large.
            sums = torch.cat(self.single)
            self.variance += float(sums.var()) * len(sums) if len(sums) > 1 else math.nan
        sampling_se = math.sqrt(self.variance) if kind == "bound" else 0.0
        return TextLikelihood(
            kind=kind,
            block_size=block_size,
            tokens=self.tokens,
            real_nll=number(self.real, who),
            padding_nll=self.padding,
            sampling_se=sampling_se,
            text_se=_ratio_error(self.rows),
            forwards=self.forwards,
            right=self.right,
            masked=self.masked,
        )


def _ratio_error(rows: Sequence[tuple[float, int]]) -> float:
    """Standard error of sum(a) / sum(n) over rows (a, n); NaN of a single row."""
    used = [(total, count) for total, count in rows if count > 0]
    tokens = sum(count for _, count in used)
    if len(used) < 2:
        return math.nan
    mean = sum(total for total, _ in used) / tokens
    squares = sum((total - mean * count) ** 2 for total, count in used)
    return math.sqrt(squares * len(used) / (len(used) - 1)) / tokens
