"""Training with residual inputs: masks are fed with what a frozen reference thinks of them.

The reference reads the same noised view; its thoughts go through the embedding of the model that learns. The loss is
the ordinary one, and nothing is unrolled over steps.
"""

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.corruption.input_layout import InputLayout
from hildanext.diffusion import NoisedBatch
from hildanext.models.attention.dense import AttentionContext
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.card import ResidualCard
from hildanext.models.soft_inputs import Likely, SoftInputs, likely, mixture, normalized_entropy


@config
class ResidualConfig:
    """Residual inputs of a training. A research method: under the profile FULL alone.

    Paper: Residual Context Diffusion, arXiv:2601.22954v2, sec. 3.2.
    Differs: `ramp`, `lam` and `top` are ours; as in decoding no residual where nobody has to fill a
    mask, behind the end of an answer.
    """

    reference: str | None = None
    """A diffusion checkpoint of the same tokenizer, alignment and mask; None: the run's own start, frozen."""
    lam: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    """Times alpha, as in decoding: 1 is the paper's."""
    ramp: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False)
    """Share of the run over which `lam` rises from 0."""
    t_res: float = Field(default=1.0, gt=0, le=100, allow_inf_nan=False)
    """Temperature of the distribution whose entropy is alpha."""
    top: int = Field(default=64, ge=0, le=2147483648)
    """Likeliest tokens that a residual is the mean of, renormalised; 0 is all of them."""

    def lam_at(self, progress: float) -> float:
        """At a share of the run."""
        return self.lam if progress >= self.ramp else self.lam * progress / self.ramp

    @property
    def card(self) -> ResidualCard:
        """What the checkpoint says of it."""
        return ResidualCard(lam=self.lam, t_res=self.t_res, top=self.top)


class ResidualInputs:
    """Mixes a view's embeddings. No module: the reference is neither trained nor saved.

    `reference` may be the model that learns, under its adapters: it is then read with these off.
    """

    def __init__(self, reference: DiffusionModel, settings: ResidualConfig, chunk: int = 128) -> None:
        """`chunk`: rows of logits that exist at once."""
        self.reference, self.settings, self.chunk = reference, settings, chunk

    def mixed(
        self,
        model: DiffusionModel,
        view: NoisedBatch,
        fed: InputLayout,
        embeddings: Float[Tensor, "batch fed hidden"],
        attention: AttentionContext,
        progress: float,
    ) -> Float[Tensor, "batch fed hidden"]:
        """The embeddings of `fed` with residuals at the masks that are to be filled, and all others as they are."""
        lam = self.settings.lam_at(progress)
        if lam == 0.0 or not fed.noisy.shape[1] or not bool(view.masked.any()):
            return embeddings
        width, device = embeddings.shape[1], embeddings.device
        first = view.masked.nonzero()[:, 0] * width
        read = fed.prediction_index(view.position, view.block_size, self.reference.card.shift)[view.masked]
        place = (first + fed.noisy_column[view.masked]).to(device, non_blocking=True)
        weight, tokens = self._thoughts(model, view, fed, (first + read).to(device, non_blocking=True), attention)
        states = mixture(model.input_table.rows, tokens).to(embeddings.dtype)
        count, hidden = embeddings[..., 0].numel(), embeddings.shape[-1]
        laid = weight.new_zeros(count).index_copy(0, place, lam * weight).view(-1, width)
        return SoftInputs(
            laid, states.new_zeros(count, hidden).index_copy(0, place, states).view(-1, width, hidden)
        ).mixed(embeddings)

    @torch.no_grad()
    def _thoughts(
        self, model: DiffusionModel, view: NoisedBatch, fed: InputLayout, read: Tensor, attention: AttentionContext
    ) -> tuple[Float[Tensor, " masks"], Likely]:
        """Alpha of each mask and its tokens, from the reference's states at the columns `read`."""
        sent, columns = view.to(model.device), fed.to(model.device)
        tokens, position = columns.tokens(sent), columns.rows(sent).position
        reference = self.reference
        if reference is model:  # its start had no `mask_delta`
            from hildanext.models.lora import without_lora  # loads peft, which who only decodes has no use for

            with without_lora(model):
                hidden = model(model.causal_lm.get_input_embeddings()(tokens), position, attention)
        else:
            hidden = reference(reference.embed(tokens), position, attention)
        weights, parts = [], []
        for states in hidden.flatten(0, 1)[read].split(self.chunk):
            logits = reference.logits(states)
            weights.append(normalized_entropy(logits, self.settings.t_res))
            parts.append(likely(logits, self.settings.top))
        ids = [part.ids for part in parts if part.ids is not None]
        return torch.cat(weights), Likely(torch.cat(ids) if ids else None, torch.cat([p.probability for p in parts]))
