"""Run folders listed and compared: what was asked for, how far it came, where it ended."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hildanext.core.errors import DataError
from hildanext.core.metrics_log import METRICS, run_metrics
from hildanext.core.plots import comparison_figure, save
from hildanext.core.rl_plots import accuracies_figure
from hildanext.core.run_dir import RUN_FILE, read_run

STAGES = ("convert", "sft", "rl")
"""Sections of a run's configuration that train; the first one present names the run's kind."""


LAST_ROUNDS = 10
"""Steps whose mean reward is shown: a round is a small sample."""


@dataclass(frozen=True)
class RunSummary:
    """One run's folder. Numbers that the run has not measured are None."""

    folder: Path
    kind: str
    profile: str
    seed: int
    changed: str
    """When its metrics (or its record) last changed, UTC, to the minute."""
    step: int | None
    tokens: int | None
    loss: float | None
    """Of a supervised training; that of a policy, near 0 by nature, says nothing."""
    reward: float | None
    """Of an alignment: the mean of its last rounds."""
    held_out: Mapping[str, float]
    """Numbers of the last evaluation line."""
    checkpoint: bool
    record: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]

    @property
    def bound(self) -> float | None:
        """The last held-out bound, nats per token at the checkpoint's block size."""
        return self.held_out.get("bound")

    @property
    def accuracy(self) -> float | None:
        """Of an alignment: the last held-out accuracy, greedy."""
        return self.held_out.get("accuracy")

    def as_json(self) -> dict[str, Any]:
        """Everything but the record and the metric lines."""
        return {
            "run": str(self.folder), "kind": self.kind, "profile": self.profile, "seed": self.seed,
            "changed": self.changed, "step": self.step, "tokens": self.tokens, "loss": self.loss, "reward": self.reward,
            "held_out": dict(self.held_out), "checkpoint": self.checkpoint,
        }  # fmt: skip


def find_runs(places: Iterable[str | Path]) -> list[RunSummary]:
    """Every run in the given folders and below them, the newest first.

    Raises `DataError` where a place is not a folder or holds no run, `CheckpointError` for a broken record.
    """
    summaries: dict[Path, RunSummary] = {}
    for place in places:
        root = Path(place)
        if not root.is_dir():
            raise DataError(f"{str(place)!r} is not a folder", "name the folder of a run, or one that holds runs")
        records = sorted(root.rglob(RUN_FILE))
        if not records:
            raise DataError(f"no run in {str(place)!r} (no {RUN_FILE})", "runs are made by run, convert, sft or rl")
        summaries.update({record.parent.resolve(): summarise(record.parent) for record in records})
    return sorted(summaries.values(), key=lambda run: run.changed, reverse=True)


def summarise(folder: Path) -> RunSummary:
    """Read one run's folder. Raises `DataError` where it is none."""
    record = read_run(folder)
    if record is None:
        raise DataError(f"{str(folder)!r} is no run's folder (no {RUN_FILE})", "hildanext runs lists what there is")
    metrics = run_metrics(folder)
    trained = [line for line in metrics if line.get("kind") == "train"]
    evaluated = [line for line in metrics if line.get("kind") == "eval"]
    newest = folder / METRICS if metrics else folder / RUN_FILE
    last = trained[-1] if trained else {}
    config = record.get("config", {})
    kind = next((stage for stage in STAGES if stage in config), "recipe" if "stages" in config else "?")
    rewards = [float(line["reward"]) for line in trained[-LAST_ROUNDS:] if line.get("reward") is not None]
    held_out = {
        name: float(value)
        for name, value in (evaluated[-1] if evaluated else {}).items()
        if isinstance(value, int | float) and name not in ("step", "tokens", "mask_positions")
    }
    return RunSummary(
        folder=folder,
        kind=kind,
        profile=str(record.get("profile", "?")),
        seed=int(record.get("seed", 0)),
        changed=datetime.fromtimestamp(newest.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M"),
        step=last.get("step"),
        tokens=last.get("tokens"),
        loss=None if kind == "rl" else last.get("loss"),
        reward=sum(rewards) / len(rewards) if rewards else None,
        held_out=held_out,
        checkpoint=(folder / "checkpoint").is_dir(),
        record=record,
        metrics=metrics,
    )


def differences(runs: Sequence[RunSummary]) -> dict[str, list[Any]]:
    """Configuration keys (dotted) whose values are not the same in all runs, with one value per run."""
    flat = [_flat(run.record.get("config", {})) for run in runs]
    keys = sorted({key for config in flat for key in config})
    rows = {key: [config.get(key) for config in flat] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def draw_comparison(runs: Sequence[RunSummary], path: Path) -> None:
    """The runs' held-out bounds over their tokens as a picture, or, where none has any, the held-out accuracies of
    alignments over their steps. Raises `DataError` where no run measured either."""
    named = dict(zip(short_names(runs), runs, strict=True))
    curves = {name: run.metrics for name, run in named.items() if run.bound is not None}
    aligned = {name: run.metrics for name, run in named.items() if run.accuracy is not None}
    if curves:
        save(comparison_figure(curves, title="held-out bound"), path)
    elif aligned:
        save(accuracies_figure(aligned), path)
    else:
        raise DataError("none of these runs measured a held-out bound or accuracy", "leave --plot out")


def short_names(runs: Sequence[RunSummary]) -> list[str]:
    """The folders' names, with as much of the path before them as tells them apart."""
    parts = [run.folder.resolve().parts for run in runs]
    deepest = max((len(part) for part in parts), default=1)
    for length in range(1, deepest + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(run.folder) for run in runs]


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
