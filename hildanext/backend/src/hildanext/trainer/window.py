"""What one step of the optimiser is made of: the views of its accumulation window, read from data or made."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hildanext.corruption.schedules import BlockPhase
from hildanext.data.batch import padding_tokens


@dataclass(frozen=True)
class Place:
    """Which process of how many asks."""

    process: int = 0
    processes: int = 1


@dataclass(frozen=True)
class Window:
    """A process's share of a step."""

    views: list[tuple[int, int, Any]]
    """Each after the global index of its micro-batch and its number in there; at least one."""
    positions: Int[Tensor, ""]
    """Of the documents in them, padding of last blocks included."""
    real: Int[Tensor, ""]
    """The same without that padding."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """What the line of the step says besides; the main process's counts."""


WindowSource = Callable[[int, BlockPhase, Place], Window]
"""`source(step, phase, place)`: the window of the step after `step` ones. Called once for each step that is taken, in
order, from the one on where a run was left."""


@dataclass(frozen=True)
class DataWindows:
    """Windows of `accumulate` micro-batches of data, each a pure function of its global index."""

    views: Callable[[int, BlockPhase], list[Any]]
    accumulate: int
    pad_id: int | None

    def __call__(self, step: int, phase: BlockPhase, place: Place) -> Window:
        views: list[tuple[int, int, Any]] = []
        positions: list[Tensor] = []
        real: list[Tensor] = []
        for number_in_window in range(self.accumulate):
            micro_batch = step * self.accumulate + number_in_window
            # Processes take turns: n of them with accumulation a see what one sees with n * a, in the same step.
            index = micro_batch * place.processes + place.process
            noised = self.views(index, phase)
            first = noised[0]  # a complementary pair has the same tokens twice
            inside = first.document >= 0
            positions.append(inside.sum())
            real.append((inside & ~padding_tokens(first.clean, first.document, self.pad_id)).sum())
            views.extend((index, number, view) for number, view in enumerate(noised))
        return Window(views, torch.stack(positions).sum(), torch.stack(real).sum())
