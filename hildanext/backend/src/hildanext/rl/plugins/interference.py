"""How much likelier the policy finds each token of a prompt than its reference does."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hildanext.models.bidirectional import DiffusionModel
from hildanext.rl.batch import RolloutBatch
from hildanext.rl.looks import Look, score
from hildanext.rl.policy import Policy


@torch.no_grad()
def interference(
    policy: Policy, prompts: Sequence[tuple[int, ...]], parts: int, generator: torch.Generator, chunk: int = 128
) -> list[Float[Tensor, " tokens"]]:
    """log p under the policy less log p under its reference of every prompt token, in nats; 0 for the first token.

    Every token is masked once, with about 1 / `parts` of the others; both models see the same masks, in 2 `parts`
    forwards for all prompts. Where both are the same model every score is exactly 0.
    """
    model = policy.model
    batch = _documents(prompts, model.card.block_size)
    looks = _looks(batch, parts, model.card.block_size, generator)
    with policy.sampling():
        now = _log_probs(model, batch, looks, chunk)
        with policy.reference() as reference:
            training = reference.training
            reference.eval()
            then = _log_probs(reference, batch, looks, chunk)
            reference.train(training)
    apart = (now - then).cpu()
    return [apart[row, : len(prompt)] for row, prompt in enumerate(prompts)]


def _log_probs(
    model: DiffusionModel, batch: RolloutBatch, looks: Sequence[Look], chunk: int
) -> Float[Tensor, "rows positions"]:
    return score(model, batch, looks, chunk=chunk).raw.sum(0)


def _documents(prompts: Sequence[tuple[int, ...]], size: int) -> RolloutBatch:
    """Prompts as documents in whole blocks; `scored` are their tokens but the first, `after` what fills the block."""
    lengths = [-(-len(prompt) // size) * size for prompt in prompts]
    shape = len(prompts), max(lengths)
    tokens, document = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    position = torch.zeros(shape, dtype=torch.long)
    scored, after = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
        document[row, :length], position[row, :length] = 0, torch.arange(length)
        scored[row, 1 : len(prompt)], after[row, len(prompt) : length] = True, True
    return RolloutBatch(
        tokens=tokens,
        document=document,
        position=position,
        prompt=torch.zeros(len(prompts), dtype=torch.long),
        scored=scored,
        after=after,
        step=torch.full(shape, -1),
        logp=torch.zeros(shape, dtype=torch.float64),
        entropy=torch.zeros(shape, dtype=torch.float64),
        group=torch.arange(len(prompts)),
        edits=torch.zeros(0, 5, dtype=torch.long),
    )


def _looks(batch: RolloutBatch, parts: int, size: int, generator: torch.Generator) -> list[Look]:
    """Disjoint looks: each scored token is masked in one of them, shares as equal as can be."""
    key = torch.rand(batch.tokens.shape, generator=generator, dtype=torch.float64).masked_fill(~batch.scored, 2.0)
    part = torch.where(batch.scored, key.argsort(-1).argsort(-1) % parts, -1)
    chosen = [part == number for number in range(parts)]
    return [Look(one | batch.after, one, one.double(), size) for one in chosen if bool(one.any())]
