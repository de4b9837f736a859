"""The best checkpoints of a run by what was measured on held-out data, and when to stop looking for a better one."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hildanext.core.run_dir import save_folder_atomically

Write = Callable[[Path, Mapping[str, Any]], None]
"""Writes the checkpoint of now into a folder, beside which goes what was measured."""


class BestCheckpoints:
    """Keeps the k checkpoints with the lowest `measure` (or the highest, where more is better); 0 keeps none.

    One that falls out of the k stays on disk until a state that does not name it is saved (`prune`), so that a run
    killed at any instant finds what its state names. `state` is for `Callbacks.state`.
    """

    def __init__(self, run: Path, write: Write, k: int, measure: str = "bound", highest: bool = False) -> None:
        self.run, self.write, self.k = run, write, k
        self.measure, self.sign = measure, -1.0 if highest else 1.0
        self.state: dict[str, Any] = {"best": [], "since": 0}

    def __call__(self, step: int, measured: dict[str, Any]) -> None:
        """Save the weights of `step` where they belong to the best."""
        entry = [self.sign * measured[self.measure], step]
        lowest = self.state.get("lowest")
        self.state["since"] = 0 if lowest is None or entry[0] < lowest else self.state["since"] + 1
        self.state["lowest"] = entry[0] if lowest is None else min(lowest, entry[0])
        others = [other for other in self.state["best"] if other[1] != step and self.folder(other[1]).is_dir()]
        kept = sorted([*others, entry])[: self.k]
        if entry in kept:
            self.write(self.folder(step), measured)
        self.state["best"] = kept

    def plateaued(self, patience: int | None) -> bool:
        """Whether the last `patience` validations brought nothing better; never without a patience."""
        return patience is not None and self.state["since"] >= patience

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, best first; one that was lost is left out."""
        return [step for _, step in self.state["best"] if self.folder(step).is_dir()]

    def folders(self) -> list[Path]:
        """Where they are."""
        return [self.folder(step) for step in self.steps()]

    def copy_to(self, folder: Path) -> None:
        """Put a copy of the best checkpoint there, whole or not at all."""
        source = self.folders()[0]

        def write(fresh: Path) -> None:
            shutil.copytree(source, fresh, dirs_exist_ok=True)

        save_folder_atomically(folder, write)

    def prune(self) -> None:
        """Remove the checkpoints that the state does not name."""
        named = set(self.folders())
        for folder in self.run.glob("best/step-*"):
            if folder not in named:
                shutil.rmtree(folder, ignore_errors=True)

    def folder(self, step: int) -> Path:
        return self.run / "best" / f"step-{step}"
