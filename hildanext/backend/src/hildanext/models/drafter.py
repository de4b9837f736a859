"""A parent that stays, and adapters that draft for it: clean rows compute as the parent, mask rows say what may follow.

A group of mask rows stands behind a clean row, its anchor: mask i (from 0) has the position i + 1 behind the anchor
and, by the left shift, predicts the token at the position after its own. It starts from what the anchor is at the layer
where masks enter (`enter`; 0 is the embedding), plus a vector learnt for its place. What it says may depend on the
token before, once that is known (`told`).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hildanext.core.errors import ModelError
from hildanext.models.attention.dense import AttentionContext, no_mask
from hildanext.models.bidirectional import check_backbone
from hildanext.models.gated_lora import EVERY_ROW, Gate, GatedLoraConfig, add_gated_lora
from hildanext.models.kept_copies import KeptCopies
from hildanext.models.packed_linear import pack, packs, product
from hildanext.models.sampler_head import SamplerHead


class Drafter(nn.Module):
    """A frozen causal language model with gated adapters and a vector for each place of a group.

    `places`: mask rows of a group at most. With `shared_place` one vector serves all of them. Without `lora` there are
    no adapters and no mask rows: drafts come from elsewhere. `sampler` is the inner size of the sampler head; None:
    there is none. `vocabulary` is how many tokens drafts may say; `draft_tokens` are then their ids, to be filled in by
    whoever makes or loads the drafter. None: all.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        lora: GatedLoraConfig | None,
        places: int = 0,
        enter: int = 0,
        shared_place: bool = False,
        sampler: int | None = None,
        vocabulary: int | None = None,
    ) -> None:
        super().__init__()
        check_backbone(causal_lm)
        layers = len(causal_lm.model.layers)
        if not 0 <= enter < layers:
            raise ModelError(f"masks cannot enter at layer {enter}", f"the model has layers 0 to {layers - 1}")
        self.causal_lm, self.lora, self.places, self.enter = causal_lm, lora, places, enter
        self.gate: Gate = add_gated_lora(causal_lm, lora, enter) if lora is not None else Gate()
        weight = causal_lm.get_input_embeddings().weight
        dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
        count, hidden = 1 if shared_place else places, causal_lm.config.hidden_size
        self.place_vectors = nn.Parameter(torch.zeros(count, hidden, dtype=dtype, device=weight.device))
        self.recomputes = False
        self.sampler = None if sampler is None else SamplerHead(hidden, sampler, dtype, weight.device)
        tokens = None if vocabulary is None else torch.arange(vocabulary, device=weight.device)
        self.draft_tokens: Int[Tensor, " vocabulary"] | None
        self.register_buffer("draft_tokens", tokens, persistent=False)
        self._kept = KeptCopies()

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
    def draft_head(self) -> Tensor:
        """The rows of the output matrix that stand for what drafts may say, shape [vocabulary hidden]."""
        chosen = self.draft_tokens
        return self.head if chosen is None else self._kept("draft head", lambda: self.head[chosen], self.head, chosen)

    def clean(
        self, tokens: Int[Tensor, "batch rows"], positions: Int[Tensor, "batch rows"], attention: AttentionContext
    ) -> tuple[Float[Tensor, "batch rows hidden"], Float[Tensor, "batch rows hidden"]]:
        """The parent's final (normed) states of clean rows, and their states where masks enter."""
        rows = self.causal_lm.get_input_embeddings()(tokens)
        entering = self._layers(rows, positions, attention, 0, self.enter)
        last = self._layers(entering, positions, attention, self.enter, None)
        return self.causal_lm.model.norm(last), entering

    def noisy(
        self,
        entering: Float[Tensor, "batch rows hidden"],
        places: Int[Tensor, " rows"],
        positions: Int[Tensor, "batch rows"],
        attention: AttentionContext,
    ) -> Float[Tensor, "batch rows hidden"]:
        """Final (normed) states of mask rows alone; `entering` are their anchors' states where masks enter."""
        rows = self._layers(self._masks(entering, places), positions, attention, self.enter, None, clean=0)
        hidden: Tensor = self.causal_lm.model.norm(rows)
        return hidden

    def forward(
        self,
        tokens: Int[Tensor, "batch clean"],
        anchors: Int[Tensor, " masks"],
        places: Int[Tensor, " masks"],
        positions: Int[Tensor, "batch rows"],
        attention: AttentionContext,
    ) -> Float[Tensor, "batch rows hidden"]:
        """Final (normed) states of clean rows and then of mask rows, in one forward.

        `anchors` are columns of `tokens`, one for each mask row; `positions` are those of all rows.
        """
        clean = tokens.shape[1]
        rows = self.causal_lm.get_input_embeddings()(tokens)
        rows = self._layers(rows, positions[:, :clean], attention, 0, self.enter)
        rows = torch.cat([rows, self._masks(rows[:, anchors], places)], 1)
        rows = self._layers(rows, positions, attention, self.enter, None, clean)
        hidden: Tensor = self.causal_lm.model.norm(rows)
        return hidden

    def recompute_layers(self) -> None:
        """While training keep only the input of each layer, and compute the layer again in the backward pass."""
        self.recomputes = True

    def told(
        self, hidden: Float[Tensor, "*rows hidden"], before: Int[Tensor, "*rows"]
    ) -> Float[Tensor, "*rows hidden"]:
        """Final states of mask rows that know the tokens `before` those they are to say; as they were without a sampler
        head."""
        if self.sampler is None:
            return hidden
        known: Tensor = self.sampler(hidden, self.causal_lm.get_input_embeddings()(before))
        return known

    def logits(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocab"]:
        """The parent's head, in fp32 (fp64 stays fp64)."""
        logits: Tensor = self.causal_lm.get_output_embeddings()(hidden)
        return logits if logits.dtype == torch.float64 else logits.float()

    def shortlist(
        self, hidden: Float[Tensor, "*rows hidden"], count: int
    ) -> tuple[Int[Tensor, "*rows count"], Float[Tensor, "*rows count hidden"]]:
        """The tokens that mask rows are likeliest to say before they are told anything, of those that drafts may say:
        at most `count` ids, likeliest first, and their rows of the output matrix.

        Paper: a head over frequent tokens alone, FR-Spec, arXiv:2502.14856. Differs: counted in what was learnt from.
        """
        head, chosen = self.draft_head, self.draft_tokens
        packed = self._kept("packed draft head", lambda: pack(head), head) if packs(head) else None
        scores = linear(hidden, head) if packed is None else product(hidden, packed)
        best = scores.topk(min(count, len(head)), -1).indices
        return best if chosen is None else chosen[best], head[best]

    def most_probable(self, logits: Float[Tensor, "*rows vocab"]) -> Int[Tensor, "*rows"]:
        """Of the tokens that drafts may say."""
        chosen = self.draft_tokens
        return logits.argmax(-1) if chosen is None else chosen[logits[..., chosen].argmax(-1)]

    def _masks(self, entering: Tensor, places: Tensor) -> Tensor:
        vectors = self.place_vectors[places if len(self.place_vectors) > 1 else torch.zeros_like(places)]
        return entering + vectors.to(entering.dtype)

    def _layers(
        self,
        rows: Tensor,
        positions: Tensor,
        attention: AttentionContext,
        first: int,
        last: int | None,
        clean: int = EVERY_ROW,
    ) -> Tensor:
        """Layers `first` to `last`, rows from number `clean` on adapted; Transformers 4 returns states in a tuple."""
        model = self.causal_lm.model
        layers: Sequence[nn.Module] = model.layers[first:last]
        if not layers:
            return rows
        rotary = model.rotary_emb(rows, positions)
        mask = no_mask(rows.device)

        def run(layer: nn.Module, rows: Tensor) -> Tensor:
            with self.gate.after(clean):  # in here: a layer that is computed again has the same gate
                out = layer(
                    rows,
                    attention_mask=mask,
                    position_ids=positions,
                    position_embeddings=rotary,
                    use_cache=False,
                    hilda=attention,
                )
            states: Tensor = out[0] if isinstance(out, tuple) else out
            return states

        for layer in layers:
            again = self.recomputes and torch.is_grad_enabled()
            rows = checkpoint(run, layer, rows, use_reentrant=False) if again else run(layer, rows)
        return rows
