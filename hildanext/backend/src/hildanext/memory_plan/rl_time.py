"""How long a step of an alignment is to take on a GTX 1080: columns that are fed, by a rate that was measured once.

An estimate: no such card has run it. Attention is counted as if it cost nothing.
"""

from dataclasses import dataclass

from hildanext.memory_plan.rl import ordered_of
from hildanext.memory_plan.step import Case
from hildanext.rl.config import RlConfig, Seams

MEASURED = (541.0, 649.0)
"""Tokens a second of fine-tuning all of a 0.6B model on that card, in an earlier project."""
MEASURED_WEIGHTS = 596_049_920
FORWARD, TRAINED = 2, 6
"""Operations a weight and column: of a forward, and of what was measured."""
UNPACKING = 1.2
"""Of weights in 4 bits; a guess."""


@dataclass(frozen=True)
class StepTime:
    """Columns of a step, and the seconds they take together, from the faster to the slower rate."""

    update: int
    """Columns of all its looks, which learn."""
    known: int
    """The same fed once more without gradients: to the reference, and to the old policy."""
    rollouts: int
    seconds: tuple[float, float]

    def sentence(self) -> str:
        low, high = (seconds / 60 for seconds in self.seconds)
        return (
            f"a step is to take {low:,.1f} to {high:,.1f} minutes on a GTX 1080 ({self.rollouts:,} columns in "
            f"rollouts, {self.update:,} in the update, {self.known:,} in what is known before it; not measured)"
        )


def step_time(config: RlConfig, seams: Seams, case: Case, looks: int, prompt: int) -> StepTime | None:
    """Of a step whose groups all teach, and whose answers are all as long as they may be; a round's rollouts are shared
    out among its updates. None where another engine writes, or where nobody knows how many forwards a block takes."""
    decoder = ordered_of(seams)
    if decoder is None:
        return None
    block, answer = case.feed.block, seams.rollouts.max_new_tokens
    groups = config.problems_per_round
    forwards = -(-answer // min(decoder.per_step, block))
    a_group = config.group * (forwards * block + answer) + prompt
    rollouts = groups * a_group // config.updates
    update = looks * case.feed.tokens * groups // config.train.batch_size
    known = update * (int(seams.objective.wants_reference) + int(config.updates > 1))
    learning = FORWARD * (2 if case.how.rank is not None else 3) + (FORWARD if case.recompute else 0)
    work = learning * update + FORWARD * (known + rollouts)
    weights = case.shape.parameters / MEASURED_WEIGHTS * (UNPACKING if case.how.packed else 1.0)
    slow, fast = (work * weights / (TRAINED * rate) for rate in MEASURED)
    return StepTime(update, known, rollouts, (fast, slow))
