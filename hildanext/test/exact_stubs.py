"""Parents and drafters without a network: what is said at a position is looked up, so that verdicts are known.

And adapters for the embedded parent.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hildanext.decoding.exact.expected import Placement
from hildanext.decoding.exact.policy import ExactConfig, OnePlacement, Placing
from hildanext.decoding.exact.state import ExactRow, ExactState
from hildanext.models.draft_card import DraftCard
from hildanext.models.draft_checkpoint import save_drafts
from hildanext.models.drafter import Drafter
from hildanext.models.gated_lora import GatedLoraConfig
from hildanext.models.loading.files import weights_hash
from hildanext.models.loading.load import load_parent
from hildanext.models.loading.names import locate
from small_models import small_causal

VOCAB = 64


class StubDrafter(Drafter):
    """`parent(position, token)` is the parent's argmax behind a token, `draft(anchor, place)` what a mask says."""

    def __init__(self, parent: Callable[[int, int], int], draft: Callable[[int, int], int], places: int = 2) -> None:
        super().__init__(small_causal(rows=VOCAB), GatedLoraConfig(rank=1), places)
        self.parent, self.draft = parent, draft
        self.fed: list[list[int]] = []

    def clean(self, tokens: Tensor, positions: Tensor, attention: Any) -> tuple[Tensor, Tensor]:
        self.fed.append(tokens[0].tolist())
        said = [self.parent(at, token) for at, token in zip(positions[0].tolist(), tokens[0].tolist(), strict=True)]
        hidden = torch.nn.functional.one_hot(torch.tensor(said), VOCAB).float()[None]
        return hidden, hidden

    def forward(self, tokens: Tensor, anchors: Tensor, places: Tensor, positions: Tensor, attention: Any) -> Tensor:
        clean = tokens.shape[1]
        hidden = self.clean(tokens, positions[:, :clean], attention)[0]
        at = positions[0, :clean][anchors].tolist()
        said = [self.draft(anchor, place) for anchor, place in zip(at, places.tolist(), strict=True)]
        return torch.cat([hidden, torch.nn.functional.one_hot(torch.tensor(said), VOCAB).float()[None]], 1)

    def logits(self, hidden: Tensor) -> Tensor:
        return 10.0 * hidden

    def shortlist(self, hidden: Tensor, count: int) -> tuple[Tensor, Tensor]:
        ids = hidden.topk(min(count, VOCAB), -1).indices
        return ids, 10.0 * torch.eye(VOCAB)[ids]


class Always(OnePlacement):
    """One placement for every forward, of adapters."""

    def __init__(self, placement: Placement) -> None:
        super().__init__(ExactConfig(after="all"), placement)


def started(drafter: Any, placing: Placing, prompt: list[int], limit: int, config: ExactConfig | None = None,
            observe: Callable[[Any], None] | None = None, clock: Callable[[], float] = time.perf_counter,
            ) -> tuple[ExactState, ExactRow]:  # fmt: skip
    """A state with one row whose prompt is fed."""
    config = config or placing.config
    state = ExactState(drafter, config, placing, lambda row: len(row.tokens) >= row.limit, observe, clock)
    row = state.row(prompt, limit, 0, 0)
    state.prefill(row)
    return state, row


def tiny_drafts(folder: Path, noise: float = 0.02) -> Path:
    """Adapters for the embedded parent that say something, right or wrong."""
    lora = GatedLoraConfig(rank=2)
    drafter = Drafter(load_parent("tiny")[0], lora, 3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in drafter.parameters():
            if parameter.requires_grad:
                parameter.copy_(noise * torch.randn(parameter.shape, generator=generator))
    card = DraftCard(
        parent="tiny", parent_hash=weights_hash(locate("tiny")), places=3, lora=lora, acceptance=(0.6, 0.4, 0.2)
    )
    save_drafts(folder, drafter, card)
    return folder
