"""Pictures of an alignment over its steps: reward and held-out accuracy, how varied answers are, where time goes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hildanext.core.plots import HELD_OUT, INK, PALETTE, Metrics, column, finish, new_figure, new_grid, smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SECONDS = {"seconds_rollout": "rollouts", "seconds_reward": "rewards", "seconds_known": "old and reference",
           "seconds_update": "update"}  # fmt: skip
SHARES = {
    "zero_variance": "groups that earn the same throughout",
    "unique": "different answers in a group",
    "ended": "answers that ended",
}
SMOOTHING = 0.1
"""Share of the steps that a mean runs over: rounds are few, and each is a small sample."""


def is_rl(metrics: Metrics) -> bool:
    """Whether these are the lines of an alignment."""
    return any(line.get("kind") == "train" and "round" in line for line in metrics)


def reward_figure(metrics: Metrics) -> "Figure | None":
    """Rewards of what is trained on, by part too; below it the held-out accuracy with its interval."""
    lines = _rounds(metrics, "reward")
    if not lines:
        return None
    figure, ((above,), (below,)) = new_grid(2, 1, 8.0, 5.4)
    _curve(above, lines, "reward", "reward", PALETTE[0])
    parts = sorted({name for line in lines for name in line.get("reward_parts", {})} - {"reward"})
    for colour, name in zip(PALETTE[1:], parts, strict=False):
        present = [line for line in lines if line["reward_parts"].get(name) is not None]
        values = smoothed([float(line["reward_parts"][name]) for line in present], SMOOTHING)
        above.plot(column(present, "step"), values, color=colour, linestyle="--", label=f"part: {name}")
    above.set_ylabel("reward (mean)")
    above.legend(fontsize=8.5, frameon=False, ncols=4)
    _curve(below, _rounds(metrics, "solved"), "solved", "trained on, sampled: right", PALETTE[0], 100.0)
    _held_out(below, metrics)
    below.set_ylabel("% of answers right")
    below.set_ylim(0, None)
    _steps(figure, below)
    above.set_title("Reward, and what is right on problems that are never trained on", loc="left", fontsize=11,
                    color=INK)  # fmt: skip
    return figure


def policy_figure(metrics: Metrics) -> "Figure | None":
    """Entropy of what was sampled from, and how much of a round is alike."""
    lines = _rounds(metrics, "entropy")
    if not lines:
        return None
    figure, ((above,), (below,)) = new_grid(2, 1, 8.0, 5.0)
    _curve(above, lines, "entropy", "", PALETTE[3])
    above.set_ylim(bottom=0)
    above.set_ylabel("entropy, nats a token")
    for colour, (field, label) in zip(PALETTE, SHARES.items(), strict=False):
        _curve(below, _rounds(metrics, field), field, label, colour, 100.0)
    below.set_ylim(0, 104)
    below.set_ylabel("%")
    _steps(figure, below)
    above.set_title("How varied answers are", loc="left", fontsize=11, color=INK)
    return figure


def answers_figure(metrics: Metrics) -> "Figure | None":
    """Tokens of an answer, and of a forward."""
    lines = _rounds(metrics, "length")
    if not lines:
        return None
    figure, ((above,), (below,)) = new_grid(2, 1, 8.0, 4.6)
    _curve(above, lines, "length", "", PALETTE[2])
    above.set_ylabel("tokens of an answer")
    _curve(below, _rounds(metrics, "tokens_per_forward"), "tokens_per_forward", "sampled", PALETTE[6])
    measured = [line for line in metrics if line.get("kind") == "eval" and line.get("tokens_per_forward")]
    below.plot(column(measured, "step"), column(measured, "tokens_per_forward"), color=HELD_OUT[0], marker="o",
               markersize=4, linewidth=1, label="held out, greedy")  # fmt: skip
    below.set_ylabel("tokens per forward")
    for axes in (above, below):
        axes.set_ylim(bottom=0)
    _steps(figure, below)
    above.set_title("Length of answers, and tokens per forward", loc="left", fontsize=11, color=INK)
    return figure


def distance_figure(metrics: Metrics) -> "Figure | None":
    """How far an update goes: the gradient's norm, and what the objective has of KL and clipping."""
    lines = [line for line in _rounds(metrics, "gradient_norm") if line.get("losses")]
    if not lines:
        return None
    panels = {"kl": "KL (mean)", "clipped": "% clipped"}
    present = [name for name in panels if any(line["losses"].get(name) for line in lines)]
    figure, grid = new_grid(1 + len(present), 1, 8.0, 2.0 + 1.5 * (1 + len(present)))
    _curve(grid[0][0], lines, "gradient_norm", "", PALETTE[0])
    grid[0][0].set_ylabel("gradient norm")
    for place, name in enumerate(present, 1):
        taken = [{"step": line["step"], name: line["losses"][name]} for line in lines if name in line["losses"]]
        _curve(grid[place][0], taken, name, "", PALETTE[place], 100.0 if name == "clipped" else 1.0)
        grid[place][0].set_ylabel(panels[name])
    _steps(figure, grid[-1][0])
    grid[0][0].set_title("How far updates go", loc="left", fontsize=11, color=INK)
    return figure


def time_figure(metrics: Metrics) -> "Figure | None":
    """Seconds of a step by what they went into."""
    lines = [line for line in _rounds(metrics, "seconds_update") if all(name in line for name in SECONDS)]
    if not lines:
        return None
    figure, axes = new_figure(height=3.4)
    parts = [smoothed(column(lines, name), SMOOTHING) for name in SECONDS]
    total = sum(sum(column(lines, name)) for name in SECONDS)
    labels = [f"{label}, {_share(lines, name, total)}" for name, label in SECONDS.items()]
    steps = column(lines, "step")
    if len(steps) == 1:  # an area over one point has no width
        steps, parts = [steps[0] - 0.5, steps[0] + 0.5], [part * 2 for part in parts]
    axes.stackplot(steps, *parts, colors=PALETTE[: len(parts)], labels=labels, alpha=0.85)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("seconds a step")
    finish(figure, axes, "Where the time goes (smoothed)", "steps of the optimiser")
    return figure


def accuracies_figure(runs: Mapping[str, Metrics]) -> "Figure":
    """Held-out accuracy of several alignments over their steps, each with its interval."""
    figure, axes = new_figure(height=4.2)
    for place, (name, metrics) in enumerate(runs.items()):
        _accuracy(axes, metrics, PALETTE[place % len(PALETTE)], name)
    axes.set_ylabel("% of held-out problems right, greedy")
    finish(figure, axes, f"Held-out accuracy of {len(runs)} runs", "steps of the optimiser")
    return figure


def _share(lines: Metrics, name: str, total: float) -> str:
    return f"{100 * sum(column(lines, name)) / total:.0f} %" if total > 0 else "0 %"


def _held_out(axes: "Axes", metrics: Metrics) -> None:
    measured = _accuracy(axes, metrics, HELD_OUT[0], "held out, greedy")
    sampled = [line for line in measured if line.get("sampled_accuracy") is not None]
    passes = sorted({name for line in sampled for name in line if name.startswith("pass_at_")})
    for place, (field, label) in enumerate(
        {"sampled_accuracy": "held out, sampled", **{name: f"held out, pass@{name[8:]}" for name in passes}}.items(), 1
    ):
        lines = [line for line in sampled if line.get(field) is not None]
        if lines:
            axes.plot(column(lines, "step"), [100 * value for value in column(lines, field)], linestyle=":",
                      color=HELD_OUT[place], marker="sD^v"[place % 4], markersize=5, label=label)  # fmt: skip


def _accuracy(axes: "Axes", metrics: Metrics, colour: str, label: str) -> Sequence[Mapping[str, Any]]:
    """Draw the evaluations with their intervals, and return them."""
    measured = [line for line in metrics if line.get("kind") == "eval" and line.get("accuracy") is not None]
    if measured:
        values = [100 * value for value in column(measured, "accuracy")]
        below = [100 * max(0.0, line["accuracy"] - line.get("accuracy_low", line["accuracy"])) for line in measured]
        above = [100 * max(0.0, line.get("accuracy_high", line["accuracy"]) - line["accuracy"]) for line in measured]
        axes.errorbar(column(measured, "step"), values, yerr=[below, above], color=colour, marker="o",
                      markersize=4, linewidth=1.3, capsize=2, label=label)  # fmt: skip
    return measured


def _curve(axes: "Axes", lines: Metrics, field: str, label: str, colour: str, times: float = 1.0) -> None:
    if lines:
        steps, values = column(lines, "step"), [times * value for value in column(lines, field)]
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(values, SMOOTHING), color=colour, linewidth=1.8, label=label or "_")


def _rounds(metrics: Metrics, field: str) -> Sequence[Mapping[str, Any]]:
    return [line for line in metrics if line.get("kind") == "train" and line.get(field) is not None and "step" in line]


def _steps(figure: "Figure", axes: "Axes") -> None:
    finish(figure, axes, "", "steps of the optimiser")
