"""The pictures of a training, whichever stage it is: every one that its metrics have the fields for."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hildanext.core.plots import (
    Metrics,
    accuracy_figure,
    curve_figure,
    drafts_figure,
    held_out_figure,
    loss_figure,
    parts_figure,
    save,
)
from hildanext.core.rl_plots import answers_figure, distance_figure, is_rl, policy_figure, reward_figure, time_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Drawers = Mapping[str, Callable[[Metrics], "Figure | None"]]

SUPERVISED: Drawers = {
    "loss": loss_figure,
    "losses": parts_figure,
    "drafts": drafts_figure,
    "masked_accuracy": accuracy_figure,
    "held_out": held_out_figure,
    "learning_rate": lambda lines: curve_figure(lines, "learning_rate", "learning rate", smooth=False),
    "throughput": lambda lines: curve_figure(lines, "tokens_per_second", "data tokens per second", from_zero=True),
}
ALIGNMENT: Drawers = {
    "reward": reward_figure,
    "policy": policy_figure,
    "answers": answers_figure,
    "distance": distance_figure,
    "time_split": time_figure,
}


def training_plots(metrics: Metrics, folder: str | Path) -> list[Path]:
    """Draw every picture the metrics have the fields for; returns the files, the loss or the reward first."""
    drawn = ((name, draw(metrics)) for name, draw in (ALIGNMENT if is_rl(metrics) else SUPERVISED).items())
    return [save(figure, Path(folder) / f"{name}.png") for name, figure in drawn if figure is not None]
