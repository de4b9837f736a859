"""Who may attend to whom. Pure functions, True = may attend.

One rule serves training and inference (BD3-LM, arXiv:2503.09573; LLaDA2.0, arXiv:2512.15745, eq. 3):
a noisy token sees its own noisy block and the clean tokens of strictly earlier blocks; a clean token
sees clean tokens only, block-causally or token-causally; nobody sees another document.
Blocks are counted from position 0 of each document. Continuations of one beginning may lie behind it as branches:
nobody sees another branch, and the beginning sees none.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

CleanMask = Literal["block_causal", "token_causal"]


class TokenRows(NamedTuple):
    """What the rule needs to know of each token; all of shape [batch seq], or None."""

    document: Int[Tensor, "batch seq"]
    """Index of the document inside the row; -1 is padding."""
    position: Int[Tensor, "batch seq"]
    """Index of the token inside its document."""
    noisy: Bool[Tensor, "batch seq"]
    """True for a token of the block being denoised, False for a clean (final) one."""
    branch: Int[Tensor, "batch seq"] | None = None
    """Which continuation of its document's beginning a token belongs to; -1 is the beginning, None that there is one
    continuation alone."""

    def each(self, change: Callable[[Tensor], Tensor]) -> "TokenRows":
        """The rows with every part changed in the same way."""
        branch = None if self.branch is None else change(self.branch)
        return TokenRows(change(self.document), change(self.position), change(self.noisy), branch)


def may_attend(
    queries: TokenRows, keys: TokenRows, block_size: int, clean_mask: CleanMask = "block_causal"
) -> Bool[Tensor, "batch query key"]:
    """The rule itself, for any queries and keys."""
    q_block, k_block = queries.position[:, :, None] // block_size, keys.position[:, None, :] // block_size
    q_noisy, k_noisy = queries.noisy[:, :, None], keys.noisy[:, None, :]
    same_document = queries.document[:, :, None] == keys.document[:, None, :]
    same_document &= keys.document[:, None, :] >= 0
    if clean_mask == "block_causal":
        clean = q_block >= k_block
    else:
        clean = queries.position[:, :, None] >= keys.position[:, None, :]
    allowed = q_noisy & k_noisy & (q_block == k_block)
    allowed |= q_noisy & ~k_noisy & (q_block > k_block)
    allowed |= ~q_noisy & ~k_noisy & clean
    if keys.branch is not None and queries.branch is not None:
        branch = keys.branch[:, None, :]
        same_document &= (branch < 0) | (branch == queries.branch[:, :, None])
    return allowed & same_document


def doubled(
    document: Int[Tensor, "batch seq"],
    position: Int[Tensor, "batch seq"],
    block_size: int,
    clean_mask: CleanMask = "block_causal",
) -> Bool[Tensor, "batch twice_seq twice_seq"]:
    """Mask of the training input `[x_t ; x_0]`: noisy half first, both halves with the same positions.

    Padding rows (document -1) attend to themselves alone, so that no softmax row is empty.
    """
    noisy = torch.ones_like(document, dtype=torch.bool)
    rows = TokenRows(
        torch.cat([document, document], -1), torch.cat([position, position], -1), torch.cat([noisy, ~noisy], -1)
    )
    return among(rows, block_size, clean_mask)


def among(
    rows: TokenRows, block_size: int, clean_mask: CleanMask = "block_causal", first_key: int = 0
) -> Bool[Tensor, "batch fed key"]:
    """Mask of the columns of a training forward among themselves, whichever copies these are.

    The keys are the columns from `first_key` on. Padding attends to itself alone.
    """
    keys = rows.each(lambda part: part[:, first_key:])
    mask = may_attend(rows, keys, block_size, clean_mask)
    itself = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)[:, first_key:]
    return mask | (itself & (rows.document < 0)[:, :, None])


def same_document(document: Int[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq seq"]:
    """Mask of a single noisy copy whose block is the whole document (block size = length)."""
    mask = (document[:, :, None] == document[:, None, :]) & (document[:, None, :] >= 0)
    return _with_padding(mask, document)


def clean_only(
    document: Int[Tensor, "batch seq"],
    position: Int[Tensor, "batch seq"],
    block_size: int,
    clean_mask: CleanMask,
) -> Bool[Tensor, "batch seq seq"]:
    """Mask of a single clean copy, as the clean half of `doubled` sees itself."""
    return among(TokenRows(document, position, torch.zeros_like(document, dtype=torch.bool)), block_size, clean_mask)


def _with_padding(
    mask: Bool[Tensor, "batch seq seq"], document: Int[Tensor, "batch seq"]
) -> Bool[Tensor, "batch seq seq"]:
    itself = torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    return mask | (itself & (document < 0)[:, :, None])
