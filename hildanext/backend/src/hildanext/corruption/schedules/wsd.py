"""Warmup-Stable-Decay: the block size over the run, as an explicit list of phases.

Paper: LLaDA2.0, arXiv:2512.15745, sec. 4.1.
Differs: the paper names 1, 4, 32, 64, 4096 up and 2048, 32 down and gives no budgets; every phase here
says its own share in tokens, and the learning rate is a separate schedule.
"""

from typing import Literal

from pydantic import Field

from hildanext.core.config import config
from hildanext.core.errors import ConfigError

Phase = Literal["warmup", "stable", "decay"]


@config
class BlockPhase:
    """Train at one block size for a number of tokens (data tokens, counted once however often they are fed)."""

    phase: Phase
    block_size: int = Field(ge=1)
    tokens: int = Field(ge=1)


def check_phases(phases: tuple[BlockPhase, ...], sequence_length: int) -> None:
    """Raises `ConfigError` for an empty ladder, a block size that does not divide, or phases out of order."""
    if not phases:
        raise ConfigError("wsd has no phases", 'list at least one {"phase", "block_size", "tokens"}')
    order = {"warmup": 0, "stable": 1, "decay": 2}
    for block_phase in phases:
        if sequence_length % block_phase.block_size:
            raise ConfigError(
                f"block size {block_phase.block_size} does not divide the sequence length {sequence_length}",
                "choose block sizes that divide data.sequence_length",
            )
    ranks = [order[block_phase.phase] for block_phase in phases]
    if ranks != sorted(ranks):
        raise ConfigError("the phases of wsd are out of order", "warmup phases first, then stable, then decay")


def check_padding(phases: tuple[BlockPhase, ...], block_size: int, pad_to_block: int | None) -> None:
    """Raises `ConfigError` where documents packed in multiples of `pad_to_block` (None: of 1) end inside a block.

    The model would see where they end, which no decoder shows it, so at the block size that is decoded this is
    refused. A phase may be larger: a climb to the whole row is part of the method, and the decay comes back.
    """
    pad = 1 if pad_to_block is None else pad_to_block
    if pad % block_size:
        raise ConfigError(
            f"data.pad_to_block {pad_to_block} is not a multiple of the block size {block_size}",
            f"set data.pad_to_block to {block_size} or a multiple of it, or choose another convert.block_size",
        )
    for block_phase in phases:
        if pad % block_phase.block_size and block_phase.block_size % pad:
            raise ConfigError(
                f"data.pad_to_block {pad_to_block} and the block size {block_phase.block_size} of wsd: "
                "neither is a multiple of the other",
                "choose block sizes that divide data.pad_to_block, or multiples of it",
            )


def phase_at(phases: tuple[BlockPhase, ...], tokens_seen: int) -> BlockPhase:
    """The phase a run is on after `tokens_seen` data tokens; past the end, the last one."""
    for block_phase in phases:
        if tokens_seen < block_phase.tokens:
            return block_phase
        tokens_seen -= block_phase.tokens
    return phases[-1]


def total_tokens(phases: tuple[BlockPhase, ...]) -> int:
    return sum(block_phase.tokens for block_phase in phases)


def spread(phase: Phase, block_sizes: list[int], tokens: int) -> tuple[BlockPhase, ...]:
    """A ladder: `tokens` divided evenly over `block_sizes`, the remainder on the last phase."""
    each = tokens // len(block_sizes)
    last = tokens - each * (len(block_sizes) - 1)
    return tuple(
        BlockPhase(phase=phase, block_size=size, tokens=last if i == len(block_sizes) - 1 else each)
        for i, size in enumerate(block_sizes)
    )
