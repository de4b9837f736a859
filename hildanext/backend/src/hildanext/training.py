"""The supervised loop, used by every stage: accumulate, clip, guard, log, checkpoint, resume.

A stage hands in a `Stage`: which block size now, which views for a micro-batch, what to validate. Views are
a pure function of the micro-batch's global index, so a resumed run, and a run on two processes with half the
accumulation, see the same data and the same noise.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor

from hildanext.config import knobs
from hildanext.diffusion import View, next_turn, targets
from hildanext.errors import TrainingStopped
from hildanext.log import MetricLog
from hildanext.loop.guard import Guard, GuardKnobs
from hildanext.loop.interrupt import between_steps
from hildanext.loop.progress import TrainingProgress
from hildanext.loop.state import load_state, save_state, trainable
from hildanext.runtime import accelerates_bf16, keep_freed_memory
from hildanext.schedules import LearningRate, MaskNoise, Rung
from hildanext.supervision import Outcome, SupervisedStep

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
BUCKETS = ("0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00")


@knobs
class TrainKnobs:
    """How the loop trains; what it trains on is the stage's business."""

    batch_size: int = Field(default=2, ge=1)
    """Rows of a micro-batch, per process."""
    accumulate: int = Field(default=1, ge=1)
    """Micro-batches of a step, per process."""
    learning_rate: LearningRate = LearningRate()
    mask_noise: MaskNoise = MaskNoise()
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1.0, gt=0)
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Autocast over fp32 weights; `auto` is bf16 where the device computes in it."""
    guard: GuardKnobs = GuardKnobs()
    checkpoint_every: int = Field(default=200, ge=1)
    evaluate_every: int = Field(default=100, ge=1)
    chunk: int = Field(default=256, ge=1)
    """Rows of logits that exist at once."""
    stop_after: int | None = Field(default=None, ge=1)
    """Stop (resumable) after this many steps in total; for tests and for time limits."""


@dataclass
class Stage:
    """What a stage brings to the loop."""

    total_tokens: int
    rung: Callable[[int], Rung]
    """Data tokens seen -> phase and block size."""
    views: Callable[[int, Rung], list[View]]
    """Global micro-batch index -> its noised views (two for a complementary pair)."""
    validate: Callable[[SupervisedStep, int], dict[str, Any]] | None = None
    teacher: Callable[[View], Tensor] | None = None
    turns: int = 1
    seed: int = 0
    on_evaluation: Callable[[int, dict[str, Any]], None] | None = None
    """Called by the main process after each validation, for instance to keep the best weights."""
    counters: dict[str, Any] = field(default_factory=dict)
    """The stage's own state; saved and restored with the run."""


@dataclass
class _Window:
    """Sums over the micro-batches of one optimiser step."""

    total: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    correct: Tensor | None = None
    masked: Tensor | None = None

    def add(self, outcome: Outcome) -> None:
        self.total += float(outcome.total.detach())
        for name, value in outcome.losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + float(value)
        self.correct = outcome.correct if self.correct is None else self.correct + outcome.correct
        self.masked = outcome.masked if self.masked is None else self.masked + outcome.masked


def make_accelerator(knobs: TrainKnobs, device: torch.device) -> Accelerator:
    """An Accelerator whose precision is the asked one, or what the device really computes in."""
    precision = knobs.precision
    if precision == "auto":
        precision = "bf16" if accelerates_bf16(device) else "no"
    return Accelerator(mixed_precision=precision, cpu=device.type == "cpu")


def make_generator(*keys: int) -> torch.Generator:
    """A CPU generator that depends on all keys (seed, stream, index, ...)."""
    entropy = [len(keys), *keys]  # numpy pads with zeros, so (0, 1) and (0, 1, 0) would be the same
    state = numpy.random.SeedSequence(entropy).generate_state(1, numpy.uint64)[0]
    return torch.Generator().manual_seed(int(state) % (2**63))


def make_optimizer(module: torch.nn.Module, knobs: TrainKnobs) -> torch.optim.Optimizer:
    """AdamW; matrices decay, vectors and embeddings do not."""
    decayed: list[torch.nn.Parameter] = []
    spared: list[torch.nn.Parameter] = []
    for name, parameter in trainable(module).items():
        (decayed if parameter.ndim >= 2 and "embed" not in name else spared).append(parameter)
    groups = [{"params": decayed, "weight_decay": knobs.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=knobs.learning_rate.peak, betas=knobs.betas, fused=True
    )


def train(
    step_module: SupervisedStep, stage: Stage, knobs: TrainKnobs, run: Path, quiet: bool = False
) -> dict[str, Any]:
    """Train until the stage's tokens are seen; resumes where `run` has a state. Returns the counters.

    Raises `TrainingStopped` when a guard trips and `CheckpointError` when the disk is full; in both cases
    the last whole checkpoint stays. Ctrl-C ends the run after the step it falls in, which is saved.
    """
    if not keep_freed_memory():
        logger.info("this C library hands freed memory back at once; steps on a CPU are somewhat slower for it")
    accelerator = make_accelerator(knobs, step_module.model.device)
    optimizer = make_optimizer(step_module, knobs)
    counters = load_state(run, step_module, optimizer) or {"step": 0, "tokens": 0, "seconds": 0.0}
    stage.counters.update(counters.get("stage", {}))
    guard = Guard(knobs.guard)
    if "guard" in counters:
        guard.restore(counters["guard"])
    module, optimizer = accelerator.prepare(step_module, optimizer)
    loop = _Loop(accelerator, module, step_module, optimizer, stage, knobs, run, guard, counters)
    return loop.run_to_end(quiet)


class _Loop:
    def __init__(
        self,
        accelerator: Accelerator,
        module: Any,
        step_module: SupervisedStep,
        optimizer: Any,
        stage: Stage,
        knobs: TrainKnobs,
        run: Path,
        guard: Guard,
        counters: dict[str, Any],
    ) -> None:
        self.accelerator, self.module, self.plain, self.optimizer = accelerator, module, step_module, optimizer
        self.stage, self.knobs, self.run, self.guard, self.counters = stage, knobs, run, guard, counters
        self.block_size = 0
        self.saved_step = counters["step"]

    def run_to_end(self, quiet: bool) -> dict[str, Any]:
        counters, knobs, main = self.counters, self.knobs, self.accelerator.is_main_process
        last = knobs.stop_after if knobs.stop_after is not None else 2**62
        metrics = MetricLog(self.run / METRICS) if main else None
        if metrics is not None:
            metrics.truncate_after(counters["step"])
        self.module.train()
        progress = TrainingProgress(self.stage.total_tokens, counters["tokens"], quiet or not main)
        try:
            with between_steps() as interrupt, progress:
                while counters["tokens"] < self.stage.total_tokens and counters["step"] < last:
                    line = self._step()
                    if metrics is not None:
                        metrics.write(kind="train", **line)
                    progress.update(
                        line["tokens"],
                        line["phase"],
                        line["block_size"],
                        line["loss"],
                        line["masked_accuracy"],
                        line["tokens_per_second"],
                    )
                    if self._due(knobs.evaluate_every):
                        self._evaluate(metrics, progress)
                    if self._due(knobs.checkpoint_every) or interrupt.asked:
                        self._save()
                    if interrupt.asked:
                        raise KeyboardInterrupt
        finally:
            if metrics is not None:
                metrics.close()
        self._save()
        return counters

    def _due(self, every: int) -> bool:
        return self.counters["step"] % every == 0 or self.counters["tokens"] >= self.stage.total_tokens

    def _step(self) -> dict[str, Any]:
        started, counters, accelerator = time.perf_counter(), self.counters, self.accelerator
        rung = self.stage.rung(counters["tokens"])
        if rung.block_size != self.block_size:
            if self.block_size:
                self.guard.forget()
            self.block_size = rung.block_size
        progress = counters["tokens"] / self.stage.total_tokens
        views, data_tokens = self._window_views(rung)
        count = sum(int(targets(v.maskable, v.position, self.plain.model.card.shift).sum()) for v in views)
        totals = torch.tensor([count * self.stage.turns, data_tokens], dtype=torch.float64, device=accelerator.device)
        normaliser, data_tokens = (int(x) for x in accelerator.reduce(totals, "sum").tolist())
        if normaliser == 0:
            raise TrainingStopped("a step has no token to predict", "check the data: documents of one token?")
        rate = self.knobs.learning_rate.at(progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        window = self._forward_backward(views, normaliser, self.knobs.mask_noise.at(progress))
        norm = float(accelerator.clip_grad_norm_(self.module.parameters(), self.knobs.clip))
        sums = self._reduced(window)
        loss = sums.pop("total") / normaliser
        self.guard.check(counters["step"] + 1, rung.block_size, loss, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        counters["step"] += 1
        counters["tokens"] += data_tokens
        counters["seconds"] += seconds
        masked, correct = sums.pop("masked"), sums.pop("correct")
        return {
            "step": counters["step"], "tokens": counters["tokens"], "phase": rung.phase, "block_size": rung.block_size,
            "learning_rate": rate, "loss": loss, "losses": {name: value / normaliser for name, value in sums.items()},
            "masked_accuracy": sum(correct) / max(sum(masked), 1),
            "accuracy_by_t": {b: (c / m if m else None) for b, c, m in zip(BUCKETS, correct, masked, strict=True)},
            "gradient_norm": norm, "tokens_per_second": data_tokens / seconds, "seconds": seconds,
        }  # fmt: skip

    def _window_views(self, rung: Rung) -> tuple[list[View], int]:
        """This process's views of the step, and the data tokens in them (a complementary pair counts once)."""
        accelerator, knobs = self.accelerator, self.knobs
        views, data_tokens = [], 0
        for micro in range(knobs.accumulate):
            window = self.counters["step"] * knobs.accumulate + micro
            pair = self.stage.views(window * accelerator.num_processes + accelerator.process_index, rung)
            data_tokens += int((pair[0].document >= 0).sum())
            views.extend(pair)
        return views, data_tokens

    def _forward_backward(self, views: list[View], normaliser: int, mask_noise: float) -> _Window:
        accelerator, window = self.accelerator, _Window()
        forwards = [(view, turn) for view in views for turn in range(self.stage.turns)]
        view = views[0]
        for number, (start, turn) in enumerate(forwards):
            view = start if turn == 0 else view
            generator = make_generator(self.stage.seed, 3, self.counters["step"], number, accelerator.process_index)
            teacher = self.stage.teacher(view) if self.stage.teacher is not None else None
            wants_draft = turn + 1 < self.stage.turns
            last = number + 1 == len(forwards)
            with accelerator.no_sync(self.module) if not last else accelerator.autocast():
                with accelerator.autocast():
                    outcome = self.module(view, mask_noise, generator, teacher, wants_draft)
                accelerator.backward(outcome.total * (accelerator.num_processes / normaliser))
            window.add(outcome)
            if wants_draft and outcome.draft is not None:
                view = next_turn(view, outcome.draft, self.plain.model.card.mask_id)
        return window

    def _reduced(self, window: _Window) -> dict[str, Any]:
        names = sorted(window.losses)
        assert window.correct is not None and window.masked is not None
        flat = torch.tensor([window.total, *(window.losses[n] for n in names)], dtype=torch.float64)
        flat = torch.cat([flat, window.correct.cpu().double(), window.masked.cpu().double()]).to(
            self.accelerator.device
        )
        values = self.accelerator.reduce(flat, "sum").tolist()
        buckets = len(BUCKETS)
        return {
            "total": values[0],
            **dict(zip(names, values[1 : 1 + len(names)], strict=True)),
            "correct": [int(x) for x in values[-2 * buckets : -buckets]],
            "masked": [int(x) for x in values[-buckets:]],
        }

    def _evaluate(self, metrics: MetricLog | None, progress: TrainingProgress) -> None:
        if self.stage.validate is None:
            return
        self.module.eval()
        with torch.no_grad(), self.accelerator.autocast():
            found = self.stage.validate(self.plain, self.counters["step"])
        self.module.train()
        if metrics is not None:
            metrics.write(kind="eval", step=self.counters["step"], tokens=self.counters["tokens"], **found)
            numbers = ", ".join(f"{name} {value:.4f}" for name, value in found.items() if isinstance(value, float))
            progress.say(f"step {self.counters['step']}: {numbers}")
            if self.stage.on_evaluation is not None:
                self.stage.on_evaluation(self.counters["step"], found)
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        if self.saved_step == self.counters["step"] and self.counters["step"] > 0 and (self.run / "state").exists():
            return
        if self.accelerator.is_main_process:
            state = {**self.counters, "guard": self.guard.state(), "stage": self.stage.counters}
            save_state(self.run, self.plain, getattr(self.optimizer, "optimizer", self.optimizer), state)
        self.saved_step = self.counters["step"]
        self.accelerator.wait_for_everyone()
