"""A run of training in its folder: what every stage sets up, records and ends with in one way.

A stage hands in what differs: its sections, its model, its data, its step. Nothing here knows data.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from transformers import PreTrainedTokenizerBase

from hildanext.core.config import plain, validate
from hildanext.core.errors import ConfigError
from hildanext.core.metrics_log import METRICS, MetricLog, run_metrics
from hildanext.core.run_dir import RUN_FILE, open_run
from hildanext.core.runtime import machine, seed_everything
from hildanext.core.training_plots import training_plots
from hildanext.losses import SupervisedStep, TokenLoss, TrainingStep
from hildanext.losses.residual_inputs import ResidualConfig
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.checkpoint import rehearse_save
from hildanext.trainer.best_checkpoints import BestCheckpoints
from hildanext.trainer.config import TrainConfig, comparable_train, ready_device
from hildanext.trainer.processes import on_main, open_accelerator
from hildanext.trainer.residual_reference import residual_inputs
from hildanext.trainer.state import check_resumes
from hildanext.trainer.task import TrainingTask
from hildanext.trainer.teacher import reader, teacher_for

CHECKPOINT = "checkpoint"
COUNTED = ("step", "tokens", "real_tokens", "mask_positions", "seconds")

Result = TypeVar("Result")


@runtime_checkable
class StageConfig(Protocol):
    """What the section of every stage that trains has."""

    @property
    def device(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def train(self) -> TrainConfig: ...


class TrainingRun:
    """Opens the device, seeds everything, and keeps the records of one run. All processes of a run open it.

    Raises `ConfigError` for a device that is not there, or that cannot do what `train` asks for.
    """

    def __init__(self, folder: str | Path, config: StageConfig) -> None:
        self.folder, self.config = Path(folder), config
        self.accelerator = open_accelerator(config.train.precision, config.device)
        self.device = self.accelerator.device
        ready_device(config.train, self.device)
        seed_everything(config.seed)

    def on_main(self, action: Callable[[], Result]) -> Result:
        """Let the main process act while the others wait; all return its result, or all raise."""
        return on_main(self.accelerator, action)

    def record(self, sections: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
        """What `run.json` is about to say: the resolved sections, where it runs, and what the stage adds."""
        computed_on = {"machine": machine(self.device), "processes": self.accelerator.num_processes}
        return {"config": dict(sections), **computed_on, **facts}

    def check_resumes(
        self, record: Mapping[str, Any], comparable: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    ) -> None:
        """Raises `ConfigError` where the folder holds the state of another run (see `trainer.state`)."""
        self.on_main(lambda: check_resumes(self.folder, record, comparable))

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Write `run.json`."""
        facts = {name: value for name, value in record.items() if name != "config"}
        self.on_main(lambda: open_run(self.folder, record["config"], self.config.seed, facts))

    def rehearse_save(self, model: DiffusionModel, tokenizer: PreTrainedTokenizerBase, best: BestCheckpoints) -> None:
        """Raise `CheckpointError` now for what would fail at the run's end: its checkpoint, and the best ones kept."""
        self.on_main(lambda: rehearse_save(self.folder, model, tokenizer, 1 + best.k))

    def supervised(
        self,
        model: DiffusionModel,
        tokenizer: PreTrainedTokenizerBase,
        losses: dict[str, TokenLoss],
        parent: str | Path,
        parent_is_base_model: bool,
        trust_remote_code: bool = False,
        special: torch.Tensor | None = None,
        residual: ResidualConfig | None = None,
        adapted: bool = False,
    ) -> tuple[SupervisedStep, Callable[..., torch.Tensor] | None]:
        """The step that trains, and the frozen parent's reading where a loss asks for it (see `teacher_for`).
        `residual` and `adapted` as in `residual_inputs`."""
        train = self.config.train
        teacher = teacher_for(
            losses.values(), model, tokenizer, parent, train.precision, parent_is_base_model, trust_remote_code
        )
        head = teacher.head if teacher is not None else None
        mixed = residual_inputs(residual, model, tokenizer, train, adapted)
        step = SupervisedStep(model, losses, head, train.chunk, special, train.layout, mixed)
        return step, reader(teacher, model)

    def measure_start(self, task: TrainingTask, step: TrainingStep) -> None:
        """Validate what is about to be trained, once in a run: the line of step 0, to compare the end with."""
        self.on_main(lambda: self._measure_start(task, step))

    def _measure_start(self, task: TrainingTask, step: TrainingStep) -> None:
        if task.validate is None or self.evaluations():
            return
        measured = task.validate(step.eval(), 0)
        with MetricLog(self.folder / METRICS) as log:
            log.write(kind="eval", step=0, tokens=0, mask_positions=0, **measured)

    def evaluations(self) -> dict[int, dict[str, Any]]:
        """What each validation of the run measured, by its step."""
        return {line["step"]: line for line in run_metrics(self.folder) if line["kind"] == "eval"}

    def finish(
        self, counters: Mapping[str, Any], task: TrainingTask, conclude: Callable[[bool], dict[str, Any]]
    ) -> dict[str, Any]:
        """The summary. `conclude(whole)` writes the checkpoint of a run that came to its end and says what it adds to
        it; the main process alone calls it. Last the plots."""
        return self.on_main(lambda: self._finish(counters, task, conclude))

    def _finish(
        self, counters: Mapping[str, Any], task: TrainingTask, conclude: Callable[[bool], dict[str, Any]]
    ) -> dict[str, Any]:
        whole, finished = counters[task.unit] >= task.total, task.callbacks.finished
        early = not whole and finished is not None and finished()
        summary: dict[str, Any] = {**{name: counters[name] for name in COUNTED}, "whole": whole or early}
        if finished is not None:
            summary["stopped_early"] = early
        summary |= conclude(whole or early)
        training_plots(run_metrics(self.folder), self.folder / "plots")
        return summary


def refuse_graph_losses(losses: Mapping[str, TokenLoss], where: str, why: str, hint: str) -> None:
    """Raise `ConfigError` for a loss that needs causal graphs; for a stage whose data has none."""
    for name in (name for name, loss in losses.items() if loss.needs_graphs):
        raise ConfigError(f"{where}: {name!r} needs causal graphs{why}", hint)


def comparable_section(
    kind: type[Any], record: Mapping[str, Any], name: str, harmless: Sequence[str]
) -> dict[str, Any]:
    """What of a stage's section in `run.json` decides numbers: all but `harmless`, and `train` without its own.

    The section is built anew, so that knobs which an older version did not know have their defaults.
    """
    section = plain(validate(kind, record["config"].get(name, {}), f"{RUN_FILE}: {name}"))
    kept = {key: value for key, value in section.items() if key not in harmless}
    if "train" in kept:
        kept["train"] = comparable_train(kept["train"], record.get("processes", 1))
    return kept
