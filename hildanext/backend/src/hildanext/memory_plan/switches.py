"""What can be changed so that a step fits, each with its price; and the cheapest set that does."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from hildanext.memory_plan.rl import alignment_peak
from hildanext.memory_plan.sections import Question
from hildanext.memory_plan.serving import Serving, serving_peak
from hildanext.memory_plan.step import Case, Peak, training_peak
from hildanext.models.lora import LoraConfig

RANK = 16
SMALL_CHUNK = 64
FEW_SLOTS = 8


@dataclass(frozen=True)
class Switch:
    """`price` is in words; `cost` orders switches, those that change no number first. None: it is on already."""

    name: str
    price: str
    cost: int
    on: Callable[[Case], Case | None]


def _recompute(case: Case) -> Case | None:
    return None if case.recompute else replace(case, recompute=True)


def _chunk(case: Case) -> Case | None:
    return None if case.chunk <= SMALL_CHUNK else replace(case, chunk=SMALL_CHUNK)


def _one_row(case: Case) -> Case | None:
    if case.feed.batch == 1:
        return None
    feed = replace(case.feed, batch=1)
    return replace(case, feed=feed, supervised=case.supervised // case.feed.batch, several=True)


def _offload(case: Case) -> Case | None:
    return None if case.resting or case.on_cpu else replace(case, resting=True)


def _eight_bit(case: Case) -> Case | None:
    return None if case.eight_bit else replace(case, eight_bit=True)


def _lora(case: Case) -> Case | None:
    if case.how.rank is not None:
        return None
    how = replace(case.how, rank=RANK, targets=LoraConfig().targets)
    shares = case.teacher == "copy" and case.starts_at_teacher
    reference = None if case.own_reference else case.reference
    return replace(case, how=how, teacher="own" if shares else case.teacher, reference=reference)


def _nf4(case: Case) -> Case | None:
    if case.how.packed or case.how.rank is None:
        return None
    return replace(case, how=replace(case.how, packed=True))


def _half(case: Case) -> Case | None:
    feed = case.feed
    blocks = max(feed.clean, feed.noisy) // feed.block
    if blocks < 2 or blocks % 2 or case.kept:
        return None
    return replace(
        case, feed=replace(feed, noisy=feed.noisy // 2, clean=feed.clean // 2), supervised=case.supervised // 2
    )


def _few_slots(case: Case) -> Case | None:
    rollouts = case.rollouts
    if rollouts is None or rollouts.slots <= FEW_SLOTS:
        return None
    return replace(case, rollouts=replace(rollouts, slots=FEW_SLOTS))


SWITCHES: tuple[Switch, ...] = (
    Switch("train.gradient_checkpointing=true", "a step takes about a third longer", 1, _recompute),
    Switch(f"train.chunk={SMALL_CHUNK}", "smaller products with the head", 1, _chunk),
    Switch("train.batch_size=1 (and train.accumulate times as many)", "smaller products throughout", 2, _one_row),
    Switch('train.offload="optimizer"', "the states cross the bus twice a step", 3, _offload),
    Switch('train.optimizer="adamw8bit"', "coarser states; needs bitsandbytes", 5, _eight_bit),
    Switch(f'lora={{"rank": {RANK}}}', "only adapters learn", 8, _lora),
    Switch('quantize="nf4"', "adapters over 4-bit weights; needs lora and bitsandbytes", 12, _nf4),
    Switch("data.sequence_length halved", "shorter rows", 24, _half),
)
"""In the order they are applied: 4 bits come after the adapters they need."""
RL_SWITCHES: tuple[Switch, ...] = (
    Switch("train.batch_size=1", "smaller products throughout", 2, _one_row),
    Switch(f"rl.rollouts.slots={FEW_SLOTS}", "fewer answers share a forward", 2, _few_slots),
    *(switch for switch in SWITCHES if switch.on not in (_one_row, _half)),
)
"""Those of an alignment, whose rows are groups, and whose answers need room before the step does."""


def worst_peak(question: Question, framework: int) -> Peak:
    """Of the block sizes of a stage the one that takes most."""
    if question.serving is not None:
        return serving_peak(question.serving, framework)
    peaks = (training_peak if case.rollouts is None else alignment_peak for case in question.cases)
    return max(
        (peak(case, framework) for peak, case in zip(peaks, question.cases, strict=True)), key=lambda peak: peak.total
    )


def switched(question: Question, switches: Sequence[Switch]) -> Question | None:
    """The question with those switches on; None where one of them is on already or makes no sense."""
    cases = []
    for start in question.cases:
        case: Case | None = start
        for switch in switches:
            case = switch.on(case) if case is not None else None
        if case is None:
            return None
        cases.append(case)
    return replace(question, cases=tuple(cases)) if cases else None


def singles(question: Question, framework: int) -> list[tuple[Switch, Peak]]:
    """Each switch alone, those that save something."""
    now, peaks = worst_peak(question, framework).total, []
    for switch in switches_of(question):
        other = switched(question, [switch])
        if other is not None:
            peak = worst_peak(other, framework)
            if peak.total < now:
                peaks.append((switch, peak))
    return peaks


def advice(question: Question, framework: int, budget: int) -> tuple[list[Switch], Peak] | None:
    """The cheapest switches with which the step fits; none where it fits as it is, None where nothing helps."""
    for switches in _sets(switches_of(question)):
        other = switched(question, switches)
        if other is not None:
            peak = worst_peak(other, framework)
            if peak.total <= budget:
                return list(switches), peak
    return None


def switches_of(question: Question) -> tuple[Switch, ...]:
    """What can be switched in a stage."""
    return RL_SWITCHES if any(case.rollouts is not None for case in question.cases) else SWITCHES


def _sets(switches: Sequence[Switch]) -> Iterator[tuple[Switch, ...]]:
    every = [chosen for count in range(len(switches) + 1) for chosen in combinations(switches, count)]
    yield from sorted(every, key=lambda chosen: sum(switch.cost for switch in chosen))


def longest_context(case: Serving, framework: int, budget: int) -> int:
    """The most tokens a document may have, in whole blocks, so that decoding fits; 0 where not even one does."""
    low, high = 0, 2**20 // case.block
    while low < high:
        middle = (low + high + 1) // 2
        fits = serving_peak(replace(case, context=middle * case.block), framework).total <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * case.block
