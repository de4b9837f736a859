"""Look at the operands: an auxiliary loss on the attention of tokens that were computed from others (C2DLM)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.core.errors import ConfigError
from hildanext.diffusion import NoisedBatch
from hildanext.losses.base import ForwardContext, TokenLoss, Weights
from hildanext.losses.causal_rows import CausalRows, causal_rows
from hildanext.models.attention.dense import AttentionContext
from hildanext.models.bidirectional import DiffusionModel

Reattention = Literal["none", "v_norm", "v_out_norm"]
RowLoss = Literal["log_hinge", "cat_hinge", "cat_nll", "cat_div", "cat_div2", "mass"]


@config
class CausalAttention(TokenLoss):
    """At effect tokens that have to be predicted, attention to the causes should exceed attention to the rest.

    With Re = A * |v| normalised over the visible columns (see `reattention`), averaged over `layers` and `heads`,
    a1 its weighted mean over the columns of causes and a0 its mean over the other visible ones, the default loss of
    a row is max(0, log(alpha) - log((a1 + eps) / (a0 + eps))). Rows are averaged over the micro-batch. Effects that
    are neither masked nor wrong have nothing to predict and are never looked at.

    Paper: C2DLM, arXiv:2511.22146 (value-aware re-attention aligned to a concept graph); CAT, arXiv:2509.01535
    (the `cat_` losses, alpha = 2).
    Differs: the paper's equation, weight, layers and heads could not be read, so form and defaults are ours. The
    project's default looks at T2T rows, which no paper tests. Under the left shift a row is where the prediction is
    read, one before the effect, as in CAT. The mask and other special tokens are no "other" columns.
    """

    research: ClassVar[bool] = True
    needs_graphs = True
    wraps_attention = True

    apply: Literal["off", "m2t", "t2t", "both"] = "t2t"
    """Effects that are masked, that hold a wrong token, or either."""
    reattention: Reattention = "v_norm"
    """Weigh attention by nothing, by the norm of the value, or by the norm of the value after the head's part of the
    output projection."""
    loss: RowLoss = "log_hinge"
    lambda_c: float = Field(default=0.1, ge=0)
    """Weight of the loss; 0 computes nothing."""
    decay_from: float = Field(default=0.5, ge=0, le=1)
    """Share of the training after which the weight falls linearly to 0; at 1 it stays."""
    alpha: float = Field(default=2.0, gt=0)
    """The ratio a1 / a0 at which a row is content."""
    eps: float = Field(default=1e-6, gt=0)
    layers: Literal["middle", "all"] | tuple[int, ...] = "middle"
    """Layers looked at, counted from 0; "middle" is the middle third."""
    heads: Literal["all"] | tuple[int, ...] = "all"
    max_rows: int = Field(default=64, ge=1)
    """Rows per sequence; more are drawn from."""
    grad_through_v: bool = False
    """Whether the loss may also change the values' norms."""

    def check_model(self, model: DiffusionModel) -> None:
        config = model.causal_lm.config
        chosen = {"layers": (self.layers, config.num_hidden_layers), "heads": (self.heads, config.num_attention_heads)}
        for name, (numbers, count) in chosen.items():
            wrong = [number for number in numbers if not isinstance(number, str) and not 0 <= number < count]
            if wrong or not numbers:
                raise ConfigError(
                    f"c2dlm.{name} {list(numbers)}", f"this model has {count}: give some of 0 to {count - 1}"
                )

    def weights(self, view: NoisedBatch, targets: Bool[Tensor, "batch seq"]) -> Weights:
        return Weights()

    def weight_at(self, progress: float) -> float:
        """lambda_c after the share `progress` of the training."""
        if progress <= self.decay_from:
            return self.lambda_c
        return self.lambda_c * max(0.0, (1.0 - progress) / (1.0 - self.decay_from))

    def auxiliary(self, context: ForwardContext) -> "AttentionToCauses | None":
        weight, view = self.weight_at(context.progress), context.view
        if self.apply == "off" or weight == 0.0:
            return None
        rows = causal_rows(
            view,
            context.fed,
            context.model.card.shift,
            context.model.card.clean_mask,
            self._wanted(view) & context.targets,
            context.special,
            self.max_rows,
            context.generator,
        )
        if rows is None:
            return None
        layers = self._layers(context.model.causal_lm.config.num_hidden_layers)
        grams = {layer: _gram(context.model, layer) for layer in layers} if self.reattention == "v_out_norm" else None
        rows = rows.to(context.model.device)
        return AttentionToCauses(context.attention, self, rows, frozenset(layers), weight, grams)

    def _wanted(self, view: NoisedBatch) -> Bool[Tensor, "batch seq"]:
        if self.apply == "both":
            return view.masked | view.replaced
        return view.masked if self.apply == "m2t" else view.replaced

    def _layers(self, count: int) -> Sequence[int]:
        if isinstance(self.layers, tuple):
            return self.layers
        return range(count) if self.layers == "all" else range(count // 3, max(count // 3 + 1, 2 * count // 3))


@dataclass
class AttentionToCauses:
    """Runs another context and, at the chosen layers, computes the rows that matter a second time.

    Under gradient checkpointing a layer is computed again in the backward pass, this part included (the recomputation
    must save what the forward saved), but only the first pass counts.
    """

    inner: AttentionContext
    config: CausalAttention
    rows: CausalRows
    layers: frozenset[int]
    weight: float
    grams: dict[int, Tensor] | None = None
    means: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> means over the heads, [2 batch rows]: attention to causes and to the rest."""
    parts: tuple[Tensor, Tensor] | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out = self.inner.attend(layer, query, key, value, scale)
        if layer in self.layers:
            with torch.autocast(query.device.type, enabled=False):
                means = self._look(layer, query, key, value, scale)
            self.means.setdefault(layer, means)  # a layer that is computed again for its gradient says it twice
        return out

    def loss(self) -> Float[Tensor, ""]:
        """lambda_c times the mean of the rows' losses."""
        causes, others = torch.stack(list(self.means.values())).mean(0)
        real = self.rows.row, self.rows.place
        config = self.config
        return self.weight * row_loss(causes[real], others[real], config.loss, config.alpha, config.eps).mean()

    def _look(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        config, rows = self.config, self.rows
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        batch, heads, fed, head_dim = query.shape
        kv_heads, count = key.shape[1], rows.index.shape[1]
        if self.parts is None:
            self.parts = _parts(rows, config.loss == "mass", kv_heads, wide)
        unseen, columns = self.parts
        index = rows.index[:, None, :, None].expand(-1, heads, -1, head_dim)
        asking = query.gather(2, index).to(wide).view(batch, kv_heads, -1, count, head_dim).transpose(2, 3) * scale
        scores = asking.reshape(batch, kv_heads, -1, head_dim) @ key.to(wide).transpose(-1, -2)
        gram = None if self.grams is None else self.grams[layer]
        norms = value_norms(value if config.grad_through_v else value.detach(), heads, config.reattention, gram)
        means = re_attention(scores.view(batch, kv_heads, count, -1, fed), unseen, norms) @ columns
        means = means.permute(4, 0, 1, 3, 2).flatten(2, 3)  # [2 batch heads rows]
        return (means if config.heads == "all" else means[:, :, list(config.heads)]).mean(2)


def _parts(rows: CausalRows, whole: bool, kv_heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What every layer needs of the rows: 0 or -inf for each column [batch 1 rows 1 fed], and the weights of the
    causes (1 for each with `whole`) and of the others [batch kv_heads rows fed 2]."""
    unseen = torch.zeros(rows.visible.shape, dtype=dtype, device=rows.visible.device)
    unseen = unseen.masked_fill(~rows.visible, float("-inf"))[:, None, :, None]
    causal = (rows.causal > 0) if whole else rows.causal
    columns = torch.stack([causal.to(dtype), rows.others.to(dtype)], -1)
    return unseen, columns[:, None].expand(-1, kv_heads, -1, -1, -1).contiguous()


def re_attention(
    scores: Float[Tensor, "batch kv_heads rows group fed"],
    unseen: Float[Tensor, "#batch 1 #rows 1 fed"],
    norms: Float[Tensor, "batch kv_heads #group fed"] | None,
) -> Float[Tensor, "batch kv_heads rows group fed"]:
    """Re = A * norms, each row divided by its sum, where A is the softmax of the scores.

    Both at once: the norms' logarithms are added to the scores, so that autograd keeps one map.
    """
    if norms is None:
        return (scores + unseen).softmax(-1)
    log_norms = norms.clamp_min(torch.finfo(norms.dtype).tiny).log()[:, :, None]  # [batch kv_heads 1 group-or-1 fed]
    return (scores + (unseen + log_norms)).softmax(-1)


def value_norms(
    value: Float[Tensor, "batch kv_heads fed head_dim"],
    heads: int,
    reattention: Reattention,
    gram: Float[Tensor, "heads head_dim head_dim"] | None = None,
) -> Float[Tensor, "batch kv_heads group fed"] | None:
    """How much each column has to give each head; None for plain attention. Group is 1 where heads share it.

    `gram` holds W_h^T W_h of each head's part of the output projection, so that v^T gram v = |W_h v|^2.
    """
    if reattention == "none":
        return None
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    value = value.to(wide)
    if reattention == "v_norm":
        return value.norm(dim=-1)[:, :, None]
    assert gram is not None
    kv_heads = value.shape[1]
    by_group = gram.to(wide).unflatten(0, (kv_heads, heads // kv_heads))
    squares = torch.einsum("bkfd,kgde,bkfe->bkgf", value, by_group, value)
    return squares.clamp_min(torch.finfo(wide).tiny).sqrt()


def row_loss(
    causes: Float[Tensor, " rows"], others: Float[Tensor, " rows"], kind: RowLoss, alpha: float, eps: float
) -> Float[Tensor, " rows"]:
    """The loss of each row from its means a1 and a0 (for `mass`, a1 is the sum over the causes).

    The `cat_` losses are 0 where the ratio has reached alpha.
    """
    if kind == "mass":
        return -(causes + eps).log()
    if kind == "log_hinge":
        return (causes.new_full((), alpha).log() - ((causes + eps) / (others + eps)).log()).clamp_min(0.0)
    ratio = causes / (others + eps)
    losses = {
        "cat_hinge": lambda: alpha - ratio,
        "cat_nll": lambda: -causes / (causes + others + eps),
        "cat_div": lambda: -(1 + causes).log() / (1 + others).log().clamp_min(eps),
        "cat_div2": lambda: -(1 + causes / (1 + others)).log(),
    }
    return torch.where(ratio < alpha, losses[kind](), torch.zeros_like(ratio))


@torch.no_grad()
def _gram(model: DiffusionModel, layer: int) -> Float[Tensor, "heads head_dim head_dim"]:
    """W_h^T W_h of a layer's output projection, head by head, whatever the projection is made of.

    The layer is asked for what it makes of unit vectors, so that adapters and packed weights need no special case.
    """
    attention = model.causal_lm.model.layers[layer].self_attn
    projection, head_dim = attention.o_proj, attention.head_dim
    width = model.causal_lm.config.num_attention_heads * head_dim
    probes = torch.eye(width + 1, width, device=model.device, dtype=model.dtype)  # the last row asks for the bias
    training = projection.training
    projection.eval()  # dropout would disturb the answer
    answer = projection(probes)
    projection.train(training)
    columns = (answer[:-1] - answer[-1]).float() if answer.dtype != torch.float64 else answer[:-1] - answer[-1]
    by_head = columns.unflatten(0, (-1, head_dim))  # [heads head_dim hidden]
    return by_head @ by_head.transpose(-1, -2)
