"""What a policy would do to wrong tokens of right answers: whether it still edits, and leaves the rest alone."""

from collections.abc import Sequence
from typing import Any

import torch

from hildanext.data.batch import Batch
from hildanext.data.problems import Problem
from hildanext.losses import SupervisedStep
from hildanext.losses.mask_to_token import MaskToToken
from hildanext.rl.policy import Policy
from hildanext.tokenization import real_ids
from hildanext.trainer.validation import EditCheck

TOGETHER = 8
"""Answers in one forward."""


class EditingMeasure:
    """The right answers of `problems` that have one, each behind its prompt; a tenth of their tokens is wrong.

    What is wrong, and with which token, is the same in every call and run of the same problems and tokenizer.
    """

    def __init__(self, policy: Policy, problems: Sequence[Problem], chunk: int = 128) -> None:
        self.policy, self.chunk = policy, chunk
        rows = [row for problem in problems if (row := _row(policy, problem)) is not None]
        batches = [_batch(policy, rows[at : at + TOGETHER]) for at in range(0, len(rows), TOGETHER)]
        real = real_ids(policy.model.card, policy.tokenizer).nonzero()[:, 0]
        self.check = EditCheck(batches, policy.model.card, real) if rows else None

    def __call__(self) -> dict[str, Any]:
        """Shares of wrong tokens that one forward would mend (`corrected`) and of right ones that it would leave alone
        (`kept`); nothing where no problem has a right answer."""
        if self.check is None:
            return {}
        with self.policy.sampling():
            return self.check(SupervisedStep(self.policy.model, {"m2t": MaskToToken()}, chunk=self.chunk), 0)


def _row(policy: Policy, problem: Problem) -> tuple[tuple[int, ...], list[int]] | None:
    """Prompt and answer; None where there is no right answer, or the context has no room for it."""
    if problem.answer is None:
        return None
    prompt = policy.encode(problem)
    answer = [*policy.tokenizer(problem.answer, add_special_tokens=False).input_ids, policy.end]
    return (prompt, answer) if policy.room(len(prompt)) >= len(answer) else None


def _batch(policy: Policy, rows: Sequence[tuple[tuple[int, ...], list[int]]]) -> Batch:
    size = policy.model.card.block_size
    lengths = [-(-(len(prompt) + len(answer)) // size) * size for prompt, answer in rows]
    shape = len(rows), max(lengths)
    tokens, document = torch.full(shape, policy.end), torch.full(shape, -1)
    position, maskable = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    for number, ((prompt, answer), length) in enumerate(zip(rows, lengths, strict=True)):
        end = len(prompt) + len(answer)
        tokens[number, :end] = torch.tensor([*prompt, *answer])
        document[number, :length], position[number, :length] = 0, torch.arange(length)
        maskable[number, len(prompt) : end] = True
    return Batch(tokens, document, position, maskable).to(policy.model.device)
