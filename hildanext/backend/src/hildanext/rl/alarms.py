"""Alarms in words: what the lines of metrics say of a run that goes wrong, each told once."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, inf, log
from typing import Any

import torch

from hildanext.core.errors import TrainingStopped, UnknownChoice
from hildanext.core.metrics_log import MetricLog, read_metrics
from hildanext.grading.base import Reward
from hildanext.grading.gsm8k import Gsm8kReward
from hildanext.grading.weighted import WeightedReward

logger = logging.getLogger(__name__)

WINDOW = 10
"""Rounds, or less of them, whose mean is compared: the first ones with the last ones."""
LATE = 3
"""Evaluations of which the mean is compared with that of the start."""
ENOUGH = 0.9
"""Share of the highest reward from which agreement is success."""
RISE = 0.1
"""Of the highest reward: a smaller change of a window's mean is noise."""
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Nats of a token by which a replay may be off what the sampler recorded."""

KEPT = (
    "step", "round", "reward", "solved", "zero_variance", "unique", "length", "entropy", "tokens_per_forward",
    "reward_parts", "replay_off", "ratio_max",
)  # fmt: skip
Line = Mapping[str, Any]


@dataclass(frozen=True)
class Facts:
    """What the lines do not say."""

    highest: float
    """The highest reward."""
    group: int
    """Answers to a problem."""
    dtype: torch.dtype = torch.float32
    """In which the update's forward computes."""
    form_parts: tuple[str, ...] = ()
    """Parts of the reward that look at the form alone."""
    pays_form: bool = False
    """Whether a reward without parts pays something for the form, so that what wrong answers earn is that."""


@dataclass
class History:
    """The rounds so far, each as the line of its first update has it, and the evaluations."""

    rounds: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def add(self, line: Line) -> bool:
        """Whether the line tells something new."""
        if line.get("kind") == "eval" and line.get("accuracy") is not None:
            self.evaluations.append({"step": line["step"], "accuracy": float(line["accuracy"])})
        elif line.get("kind") == "train" and line.get("update", 0) == 0 and line.get("reward") is not None:
            self.rounds.append({name: line[name] for name in KEPT if line.get(name) is not None})
        else:
            return False
        return True

    def ends(self, read: str | Callable[[Line], float | None]) -> tuple[float, float] | None:
        """The mean over the first and over the last `WINDOW` rounds; None before these are apart, and where one of
        their numbers is not known."""
        if len(self.rounds) < 2 * WINDOW:
            return None
        first, last = (_mean(part, read) for part in (self.rounds[:WINDOW], self.rounds[-WINDOW:]))
        return None if first is None or last is None else (first, last)


Rule = Callable[[History, Facts], str | None]


def ratio(past: History, facts: Facts) -> str | None:
    """Before a round's first update the policy is the one that wrote the answers."""
    if not past.rounds:
        return None
    now, most = past.rounds[-1], TOLERANCES[facts.dtype]
    largest = float(now.get("ratio_max", 1.0))
    of_now = abs(log(largest)) if largest > 0 else inf  # NaN is not above 0 either
    off = max(float(now.get("replay_off", 0.0)), of_now)
    if off <= most:
        return None
    return (
        f"before the first update of round {now['round']} a token's log p is {off:.2g} nats off what it was sampled "
        f"with (ratio {exp(min(off, 50.0)):.3g}; {most:g} is rounding): rollouts and updates do not follow one law"
    )


def equal_answers(past: History, facts: Facts) -> str | None:
    """The answers to each problem are one text, in two rounds one after another."""
    last = past.rounds[-2:]
    if len(last) < 2 or any(line.get("unique", 1.0) * facts.group > 1 + 1e-9 for line in last):
        return None
    return (
        f"all answers to a problem are equal, in rounds {last[0]['round']} and {last[1]['round']}, although they are "
        "sampled: does the sampler heed the temperature, or is the policy certain of everything?"
    )


def no_variance(past: History, facts: Facts) -> str | None:
    """More than half of the groups teach nothing, and not because they are solved."""
    if len(past.rounds) < WINDOW:
        return None
    same, reward = (_mean(past.rounds[-WINDOW:], name) for name in ("zero_variance", "reward"))
    if same is None or reward is None or same <= 0.5 or reward >= ENOUGH * facts.highest:
        return None
    return (
        f"{same:.0%} of the groups of the last {WINDOW} rounds earn the same throughout, and the reward is "
        f"{reward:.2f} of {facts.highest:g}: little is left to learn from; a KL, a larger group or a higher "
        "temperature keeps answers apart"
    )


def entropy(past: History, facts: Facts) -> str | None:
    """The policy has become certain before it has become good."""
    ends, reward = past.ends("entropy"), past.ends("reward")
    if ends is None or reward is None or ends[1] >= ends[0] / 5 or reward[1] >= ENOUGH * facts.highest:
        return None
    return (
        f"the entropy has fallen from {ends[0]:.3g} to {ends[1]:.3g} nats a token while the reward is "
        f"{reward[1]:.2f} of {facts.highest:g}: the policy collapses; lower the rate, or raise the KL"
    )


def length(past: History, facts: Facts) -> str | None:
    """Answers have become much shorter."""
    ends = past.ends("length")
    if ends is None or ends[1] >= ends[0] / 3:
        return None
    return f"answers have shrunk from {ends[0]:.0f} to {ends[1]:.0f} tokens: read some, before the reward is believed"


def tokens_per_forward(past: History, facts: Facts) -> str | None:
    """A threshold fills more at once, since the policy has become surer (d1, issue 25)."""
    ends = past.ends("tokens_per_forward")
    if ends is None or ends[0] <= 0 or ends[1] < 1.5 * ends[0]:
        return None
    return (
        f"a forward writes {ends[1]:.2f} tokens, {ends[0]:.2f} at the start: the policy is surer, the decoder fills "
        "more at once, and what is sampled drifts from what was measured; take the decoder ordered, or a higher tau"
    )


def form(past: History, facts: Facts) -> str | None:
    """What is earned by the form rises, and right answers do not."""
    earned, right = past.ends(lambda line: _earned_by_form(line, facts)), past.ends("solved")
    if earned is None or right is None or right[1] > right[0]:
        return None
    if earned[1] - earned[0] < (RISE if facts.form_parts else RISE / 5 * facts.highest):
        return None
    return (
        f"the form earns {earned[1]:.2f}, {earned[0]:.2f} at the start, and right answers are {right[1]:.0%}, "
        f"{right[0]:.0%} at the start: it learns how answers look; lower the weight of the form"
    )


def held_out(past: History, facts: Facts) -> str | None:
    """The reward rises and the held-out accuracy does not."""
    ends = past.ends("reward")
    if ends is None or ends[1] - ends[0] < RISE * facts.highest or len(past.evaluations) < LATE + 1:
        return None
    start, late = past.evaluations[0]["accuracy"], _mean(past.evaluations[-LATE:], "accuracy")
    if late is None or late > start:
        return None
    return (
        f"the reward has risen from {ends[0]:.2f} to {ends[1]:.2f}, and the held-out accuracy is {late:.0%} over the "
        f"last {LATE} evaluations, {start:.0%} at the start: it sharpens, learns the problems by heart, or games the "
        "reward"
    )


ALARMS: dict[str, Rule] = {
    "ratio": ratio,
    "equal_answers": equal_answers,
    "no_variance": no_variance,
    "entropy": entropy,
    "length": length,
    "tokens_per_forward": tokens_per_forward,
    "form": form,
    "held_out": held_out,
}


def check_names(names: Iterable[str]) -> None:
    """Raises `UnknownChoice` for what is no alarm."""
    for name in names:
        if name not in ALARMS:
            raise UnknownChoice("alarm", name, ALARMS)


def facts_of(reward: Reward, group: int, dtype: torch.dtype) -> Facts:
    """Of a run with this reward, whose updates compute in `dtype`."""
    forms = reward.form_names if isinstance(reward, WeightedReward) else ()
    pays = isinstance(reward, Gsm8kReward) and reward.format_weight > 0
    return Facts(reward.highest, group, dtype, forms, pays)


class Watch:
    """Reads every line of a run's metrics, says each alarm once, writes it down (kind "alarm", with `alarm`, `step` and
    `words`), and stops the run at those of `guard`.

    It has no state but the lines themselves: a run that goes on reads what it wrote before.
    """

    def __init__(self, facts: Facts, guard: Sequence[str] = ()) -> None:
        self.facts, self.guard = facts, tuple(guard)
        self.past, self.said = History(), set[str]()
        self.log: MetricLog | None = None

    def open(self, log: MetricLog) -> None:
        """From now on listen to this log; what it holds is known already."""
        self.past, self.said = History(), set()
        for line in read_metrics(log.path):
            self.past.add(line)
            self.said |= {line["alarm"]} if line.get("kind") == "alarm" else set()
        self.log = log
        log.listeners.append(self.hear)

    def hear(self, line: Line) -> None:
        """A line that was just written. Raises `TrainingStopped` for an alarm of `guard`, once it is written too."""
        if not self.past.add(line):
            return
        assert self.log is not None
        stops: list[tuple[str, str]] = []
        for name, words in self._new():
            self.said.add(name)
            logger.warning("step %d: alarm %s: %s", line["step"], name, words)
            self.log.write(kind="alarm", step=line["step"], alarm=name, words=words)
            stops += [(name, words)] if name in self.guard else []
        for name, words in stops:
            raise TrainingStopped(
                f"alarm {name} at step {line['step']}: {words}",
                f"the last saved state is kept; to go on all the same, take {name} out of rl.guard",
            )

    def _new(self) -> list[tuple[str, str]]:
        told = ((name, rule(self.past, self.facts)) for name, rule in ALARMS.items() if name not in self.said)
        return [(name, words) for name, words in told if words is not None]


def _mean(lines: Sequence[Line], read: str | Callable[[Line], float | None]) -> float | None:
    values = [line.get(read) if isinstance(read, str) else read(line) for line in lines]
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _earned_by_form(line: Line, facts: Facts) -> float | None:
    """The mean share of well-formed answers, or what wrong ones earn; None where the form earns nothing."""
    parts = line.get("reward_parts", {})
    if facts.form_parts:
        known = [float(parts[name]) for name in facts.form_parts if parts.get(name) is not None]
        return sum(known) / len(known) if known else None
    if not facts.pays_form or "solved" not in line:
        return None
    return float(line["reward"]) - float(line["solved"]) * facts.highest
