"""A plan: for each stage the peak by part, whether it fits, and what would make it fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hildanext.memory_plan.architecture import Architecture
from hildanext.memory_plan.machine import Machine, show_bytes
from hildanext.memory_plan.rl_time import StepTime
from hildanext.memory_plan.sections import Question
from hildanext.memory_plan.serving import serving_peak
from hildanext.memory_plan.step import Peak, weights_bytes
from hildanext.memory_plan.switches import advice, longest_context, singles, worst_peak

SHARE = 0.9
"""Of a card's memory: the rest is the display's, and lost between the allocator's blocks."""


@dataclass(frozen=True)
class StagePlan:
    """One stage on one machine. `switches` and `advised` hold names, prices and totals."""

    stage: str
    shape: Architecture
    peak: Peak
    budget: int
    assumes: tuple[str, ...]
    switches: tuple[tuple[str, str, int], ...] = ()
    advised: tuple[str, ...] | None = ()
    """Names of the cheapest switches that make it fit; None where nothing does."""
    advised_peak: Peak | None = None
    longest: int | None = None
    """For decoding: the longest document that fits."""
    halved: int | None = None
    """For decoding in fp32: the peak with weights and cache of half the size."""
    time: StepTime | None = None
    """Of a step, where it can be told."""

    @property
    def fits(self) -> bool:
        return self.peak.total <= self.budget


def make_plan(question: Question, machine: Machine, vram: int) -> StagePlan:
    """Ask the formulas, and try the switches where the stage does not fit."""
    budget = int(vram * (question.limit if question.limit is not None else SHARE))
    peak = worst_peak(question, machine.framework)
    case = question.serving
    if case is not None:
        longest = longest_context(case, machine.framework, budget)
        half = None
        if case.width > 2:
            half = serving_peak(replace(case, width=2), machine.framework).total
        return StagePlan(question.stage, case.shape, peak, budget, question.assumes, longest=longest, halved=half)
    shape = question.cases[0].shape
    switches = [(s.name, s.price, p.total) for s, p in singles(question, machine.framework)]
    answer = advice(question, machine.framework, budget)
    return StagePlan(
        question.stage, shape, peak, budget, question.assumes, tuple(switches),
        None if answer is None else tuple(switch.name for switch in answer[0]), None if answer is None else answer[1],
        time=question.time,
    )  # fmt: skip


def host_bytes(shape: Architecture) -> int:
    """What the computer's own memory must hold while a checkpoint in fp32 is written."""
    return weights_bytes(shape, False)


def record(plans: Sequence[StagePlan], machine: Machine, vram: int) -> dict[str, Any]:
    """A plan as JSON. Bytes throughout."""
    return {
        "machine": {"name": machine.name, "says": machine.says, "framework": machine.framework},
        "memory": vram,
        "stages": [_stage_record(plan) for plan in plans],
    }


def _stage_record(plan: StagePlan) -> dict[str, Any]:
    return {
        "stage": plan.stage,
        "model": plan.shape.name,
        "parameters": plan.shape.parameters,
        "peak": plan.peak.total,
        "parts": {name: size for name, size in plan.peak.parts.items() if size},
        "moment": plan.peak.moment,
        "moments": plan.peak.moments,
        "budget": plan.budget,
        "fits": plan.fits,
        "assumes": list(plan.assumes),
        "switches": [{"name": name, "price": price, "peak": total} for name, price, total in plan.switches],
        "advised": None if plan.advised is None else list(plan.advised),
        "advised_peak": None if plan.advised_peak is None else plan.advised_peak.total,
        "longest_document": plan.longest,
        "halved": plan.halved,
        "step_seconds": None if plan.time is None else list(plan.time.seconds),
        "host": host_bytes(plan.shape),
    }


def verdict(plan: StagePlan) -> str:
    """One sentence: fits or not, and what to do."""
    share = f"{show_bytes(plan.peak.total)} of {show_bytes(plan.budget)}"
    if plan.longest is not None:
        sentence = f"{'fits' if plan.fits else 'does not fit'} ({share}); documents of up to {plan.longest:,} tokens do"
        if plan.halved is not None and not plan.fits:
            sentence += f"; with --dtype fp16 it takes {show_bytes(plan.halved)}"
        return sentence
    if plan.fits:
        return f"fits ({share})"
    if plan.advised is None:
        return f"does not fit ({share}), whatever is switched: take a smaller model"
    assert plan.advised_peak is not None
    return f"does not fit ({share}); it does with {', '.join(plan.advised)} ({show_bytes(plan.advised_peak.total)})"


def bars(plan: StagePlan) -> Mapping[str, Mapping[str, int]]:
    """What the picture shows of a stage: as configured, and as advised where that is something else."""
    shown: dict[str, Mapping[str, int]] = {f"{plan.stage}\n{plan.shape.name}": plan.peak.parts}
    if plan.advised and plan.advised_peak is not None:
        shown[f"{plan.stage}, switched\n{plan.shape.name}"] = plan.advised_peak.parts
    return shown
