"""The diffusion model: a Transformers backbone and head, called separately, with our attention.

Weights keep their names; nothing is patched. Logits exist only where they are asked for.
"""

import contextlib
from collections.abc import Iterator
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from hildanext.core.errors import ModelError, NumericsError
from hildanext.models.attention.dense import SEAM, AttentionContext, no_mask
from hildanext.models.card import Card
from hildanext.models.soft_inputs import InputTable, SoftInputs

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def check_backbone(causal_lm: PreTrainedModel) -> None:
    """Raises `ModelError` for an unsupported architecture, `NumericsError` for another attention than ours."""
    name = type(causal_lm).__name__
    if name not in ARCHITECTURES:
        raise ModelError(f"architecture {name} is not supported", f"supported: {', '.join(ARCHITECTURES)}")
    if causal_lm.config._attn_implementation != SEAM:
        raise NumericsError("the model was loaded without our attention", f"load it with attn_implementation={SEAM!r}")


class DiffusionModel(nn.Module):
    """A causal language model's weights under the diffusion conventions of its card.

    `mask_delta` (shape [hidden], or None) is added to the mask token's embedding: the one trainable
    vector that LoRA with frozen embeddings needs.
    """

    slots_first: int | None = None
    """How a runtime other than torch wants its caches laid out; see `kv_cache.BlockCache`."""
    takes_embeddings: ClassVar[bool] = True
    """Whether `hidden` takes soft inputs; a runtime whose graph embeds tokens itself does not."""
    banned: Tensor
    """Ids that may never be emitted, bool of shape [vocab]."""

    def __init__(self, causal_lm: PreTrainedModel, card: Card, mask_delta: bool = False) -> None:
        super().__init__()
        check_backbone(causal_lm)
        self.causal_lm = causal_lm
        self.card = card
        hidden_size = causal_lm.config.hidden_size
        self.mask_delta = nn.Parameter(torch.zeros(hidden_size)) if mask_delta else None
        banned = torch.zeros(card.vocab_rows, dtype=torch.bool)
        banned[card.vocab_real :] = True
        banned[[card.mask_id, *card.never]] = True
        self.register_buffer("banned", banned, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.causal_lm.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.causal_lm.get_input_embeddings().weight.dtype

    @property
    def head(self) -> Tensor:
        """The output matrix, shape [vocab hidden]."""
        return self.causal_lm.get_output_embeddings().weight

    @property
    def input_table(self) -> InputTable:
        """The input embedding of every id; not scaled, and without `mask_delta`."""
        return InputTable(self.causal_lm.get_input_embeddings().weight, self.banned)

    def embed(
        self,
        tokens: Int[Tensor, "batch seq"],
        mask_noise: float = 0.0,
        generator: torch.Generator | None = None,
        token: Int[Tensor, "batch seq"] | None = None,
        row_length: int | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """Input embeddings; mask tokens get `mask_delta` and Gaussian noise.

        The noise has the deviation `mask_noise` in units of the trained rows' own. It is drawn on the generator's
        device, so that a seed gives the same noise everywhere. Where the columns are copies of tokens, `token` says
        of which of the row's `row_length`: the noise is a token's, so that it does not depend on what else is fed.
        """
        embeddings = self.causal_lm.get_input_embeddings()(tokens)
        masked = (tokens == self.card.mask_id)[..., None]
        if self.mask_delta is not None:
            embeddings = embeddings + masked * self.mask_delta.to(embeddings.dtype)
        if mask_noise > 0.0:
            here = embeddings.device if generator is None else generator.device
            batch, seq, hidden = embeddings.shape
            drawn = (batch, seq if row_length is None else row_length, hidden)
            noise = torch.randn(drawn, generator=generator, device=here, dtype=torch.float32)
            noise = noise.to(embeddings.device, non_blocking=True)
            if token is not None:
                noise = noise.gather(1, token[..., None].expand(-1, -1, hidden))
            deviation = mask_noise * self._deviation_of_rows().float()
            embeddings = embeddings + masked * (deviation * noise).to(embeddings.dtype)
        return embeddings

    def _deviation_of_rows(self) -> Float[Tensor, ""]:
        """Standard deviation of the trained rows' entries; taken anew, so that a resumed run finds the same."""
        return self.causal_lm.get_input_embeddings().weight.detach()[: self.card.vocab_real].std()

    @contextlib.contextmanager
    def dropout_from(self, generator: torch.Generator | None) -> Iterator[None]:
        """Forwards within the context drop (adapters may) by `generator` alone, so that a resumed run drops the same.

        Nothing is drawn where nothing is dropped, and the global generators are left as they were.
        """
        drops = self.training and any(isinstance(part, nn.Dropout) and part.p > 0 for part in self.modules())
        if generator is None or not drops:
            yield
            return
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

    def forward(
        self,
        embeddings: Float[Tensor, "batch seq hidden"],
        positions: Int[Tensor, "batch seq"],
        attention: AttentionContext,
    ) -> Float[Tensor, "batch seq hidden"]:
        """Final (normed) hidden states. The head is not applied."""
        return self.causal_lm.model(
            inputs_embeds=embeddings,
            position_ids=positions,
            attention_mask=no_mask(embeddings.device),
            use_cache=False,
            hilda=attention,
        )[0]

    def hidden(
        self,
        tokens: Int[Tensor, "batch seq"],
        positions: Int[Tensor, "batch seq"],
        attention: AttentionContext,
        soft: SoftInputs | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """Final hidden states of tokens as they are (where `soft` has no other input for them): with `logits` all that
        decoding asks of a model."""
        embeddings = self.embed(tokens)
        hidden: Tensor = self(embeddings if soft is None else soft.mixed(embeddings), positions, attention)
        return hidden

    def recompute_layers(self) -> None:
        """While training keep only the input of each layer, and compute the layer again in the backward pass.

        An attention context is then asked twice for each layer, and must answer the same.
        """
        how = {"use_reentrant": False}
        if hasattr(self.causal_lm, "activation_checkpointing_enable"):  # Transformers' newer name
            self.causal_lm.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
        else:
            self.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)

    def logits(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocab"]:
        """Logits in fp32 (fp64 stays fp64); the mask, unused rows and padding are -inf."""
        logits = self.causal_lm.get_output_embeddings()(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.masked_fill(self.banned, float("-inf"))
