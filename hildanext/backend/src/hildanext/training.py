"""The supervised loop, used by every stage: accumulate, clip, guard, log, checkpoint, resume.

A stage hands in a `Stage`: which block size now, which views for a micro-batch, what to validate. Views are
a pure function of the micro-batch's global index, so a resumed run, and a run on two processes with half the
accumulation, see the same data and the same noise.
"""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from jaxtyping import Float, Int
from torch import Tensor

from hildanext.diffusion import View, next_turn, targets
from hildanext.errors import TrainingStopped
from hildanext.log import MetricLog
from hildanext.loop.guard import Guard
from hildanext.loop.interrupt import between_steps
from hildanext.loop.knobs import TrainKnobs, comparable_train, ready_device
from hildanext.loop.optimizer import RestingStates, build_optimizer
from hildanext.loop.processes import any_process, check_agreement, on_main, open_accelerator, summed
from hildanext.loop.progress import TrainingProgress
from hildanext.loop.sharded import Shards, clip_gradients, open_shards
from hildanext.loop.state import STATE, Held, gather_state, load_state, save_state, trainable
from hildanext.runfolder import read_run, recover_folder
from hildanext.runtime import keep_freed_memory, make_generator
from hildanext.schedules import Rung
from hildanext.supervision import Outcome, SupervisedStep
from hildanext.tracking import Tracker, open_trackers, scalars

__all__ = ["Stage", "TrainKnobs", "comparable_train", "make_generator", "make_optimizer", "ready_device", "train"]

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
BUCKETS = ("0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00")


@dataclass
class Stage:
    """What a stage brings to the loop."""

    total_tokens: int
    rung: Callable[[int], Rung]
    """Tokens seen (positions, see `train`) -> phase and block size."""
    views: Callable[[int, Rung], list[View]]
    """Global micro-batch index -> its noised views (two for a complementary pair)."""
    validate: Callable[[SupervisedStep, int], dict[str, Any]] | None = None
    teacher: Callable[[View], Tensor] | None = None
    turns: int = 1
    seed: int = 0
    on_evaluation: Callable[[int, dict[str, Any]], None] | None = None
    """Called by the main process after each validation, for instance to keep the best weights."""
    samples: Callable[[int], list[dict[str, Any]]] | None = None
    """Called by the main process after that; what it returns is shown, and logged line by line as kind "sample"."""
    finished: Callable[[], bool] | None = None
    """Asked at the start and after each validation: true in the main process, it ends the training (early stopping)."""
    on_saved: Callable[[], None] | None = None
    """Called by the main process once the state is saved: only now may go what the state before it named."""
    pad_id: int | None = None
    """What fills the last block of a document, if anything does."""
    counters: dict[str, Any] = field(default_factory=dict)
    """The stage's own state; saved and restored with the run."""


@dataclass
class _Window:
    """Sums over the micro-batches of one optimiser step. They stay where they were computed until `read`."""

    outcomes: list[tuple[Outcome, float]] = field(default_factory=list)
    total: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    correct: list[int] = field(default_factory=list)
    masked: list[int] = field(default_factory=list)

    def add(self, outcome: Outcome, share: float) -> None:
        """`share` is what a loss that is an average already counts for, so that the normaliser divides it away."""
        self.outcomes.append((replace(outcome, total=outcome.total.detach(), draft=None, auxiliary=None), share))

    def read(self, norm: Float[Tensor, ""]) -> float:
        """Fill the sums and return the norm. The one point of a step where the host waits for the device."""
        wide = torch.float32 if norm.device.type == "mps" else torch.float64  # MPS has no fp64
        counts = torch.stack([torch.cat([outcome.correct, outcome.masked]) for outcome, _ in self.outcomes]).sum(0)
        scalars: list[Tensor] = []
        for outcome, _ in self.outcomes:
            scalars += [outcome.total, *outcome.losses.values(), *outcome.averages.values()]
        scalars.append(norm.to(counts.device))
        at = iter(torch.cat([torch.stack([value.to(wide) for value in scalars]), counts.to(wide)]).tolist())
        for outcome, share in self.outcomes:
            self.total += next(at)
            for name in outcome.losses:
                self.losses[name] = self.losses.get(name, 0.0) + next(at)
            for name in outcome.averages:
                value = share * next(at)
                self.losses[name] = self.losses.get(name, 0.0) + value
                self.total += value
        had = float(next(at))
        tail = [int(count) for count in at]
        self.correct, self.masked = tail[: len(BUCKETS)], tail[len(BUCKETS) :]
        return had


def make_optimizer(module: torch.nn.Module, knobs: TrainKnobs) -> torch.optim.Optimizer:
    """The optimiser of the knobs over what learns in a module. Raises `ConfigError`."""
    rate = knobs.learning_rate.peak
    return build_optimizer(knobs.optimizer, trainable(module), rate, knobs.betas, knobs.weight_decay)


def real_tokens(
    tokens: Int[Tensor, "batch seq"],
    document: Int[Tensor, "batch seq"],
    position: Int[Tensor, "batch seq"],
    pad_id: int | None,
) -> int:
    """Tokens of documents without the padding of their last blocks: `pad_id` after `pad_id` (the first may be real)."""
    inside = document >= 0
    if pad_id is not None:
        inside[:, 1:] &= (tokens[:, 1:] != pad_id) | (tokens[:, :-1] != pad_id) | (position[:, 1:] == 0)
    return int(inside.sum())


def train(
    step_module: SupervisedStep,
    stage: Stage,
    knobs: TrainKnobs,
    run: Path,
    quiet: bool = False,
    accelerator: Accelerator | None = None,
) -> dict[str, Any]:
    """Train until the stage's tokens are seen; resumes where `run` has a state. Returns the counters.

    `tokens`, of which the schedules and tokens per second speak, are positions of documents: what is computed, the
    padding of last blocks included, a complementary pair counted once. `real_tokens` leaves the padding out.
    `accelerator` is the one whose device the model is on; None opens one.

    Raises `TrainingStopped` when a guard trips and `CheckpointError` when the disk is full; in both cases
    the last whole checkpoint stays. Ctrl-C ends the run after the step it falls in, which is saved.
    """
    if not keep_freed_memory():
        logger.info("this C library hands freed memory back at once; steps on a CPU are somewhat slower for it")
    if accelerator is None:
        accelerator = open_accelerator(knobs.precision, str(step_module.model.device))
    if knobs.gradient_checkpointing:
        step_module.model.recompute_layers()
        # Autocast would keep each weight's narrow copy until the forward ends; recomputing is there to keep nothing.
        accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
    shards = open_shards(accelerator, step_module, knobs, stage.teacher is not None)
    plain = step_module if shards is None else shards.module
    optimizer = make_optimizer(plain, knobs)
    on_main(accelerator, lambda: recover_folder(run / STATE))
    saved = load_state(run, plain, optimizer)
    counters = {"step": 0, "tokens": 0, "real_tokens": 0, "seconds": 0.0, **(saved if saved is not None else {})}
    check_agreement(accelerator, counters["step"])
    stage.counters.update(counters.get("stage", {}))
    guard = Guard(knobs.guard)
    if "guard" in counters:
        guard.restore(counters["guard"])
    module, optimizer = accelerator.prepare(plain, optimizer) if shards is None else (plain, optimizer)
    loop = _Loop(accelerator, module, plain, optimizer, stage, knobs, run, guard, counters, shards)
    loop.saved_step = None if saved is None else counters["step"]
    if shards is not None and stage.samples is not None:
        stage.samples = None  # the whole model rests on a CPU, where writing would take for ever
        logger.warning("a sharded run writes no samples while it trains")
    if knobs.offload is not None:
        loop.resting = RestingStates(loop.bare_optimizer, accelerator.device)
        loop.resting.rest()
    loop.run_to_end(quiet)
    if shards is not None:
        shards.end()
    return counters


def _show(tracker: Tracker, line: Mapping[str, Any]) -> None:
    tracker.log(int(line["step"]), scalars(line))


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
        shards: Shards | None = None,
    ) -> None:
        self.accelerator, self.module, self.plain, self.optimizer = accelerator, module, step_module, optimizer
        self.stage, self.knobs, self.run, self.guard, self.counters = stage, knobs, run, guard, counters
        self.shards = shards
        self.saved_step: int | None = None
        self.owes_save = False
        self.metrics: MetricLog | None = None
        self.trackers: list[Tracker] = []
        self.resting: RestingStates | None = None
        self.bare_optimizer: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)

    def run_to_end(self, quiet: bool) -> None:
        counters, knobs, accelerator = self.counters, self.knobs, self.accelerator
        last = knobs.stop_after if knobs.stop_after is not None else 2**62
        on_main(accelerator, self._open_metrics)
        self.module.train()
        quiet = quiet or not accelerator.is_main_process
        progress = TrainingProgress(self.stage.total_tokens, counters["tokens"], quiet)
        try:
            with between_steps() as interrupt, progress:
                ended = self._finished()
                while counters["tokens"] < self.stage.total_tokens and counters["step"] < last and not ended:
                    line = self._step()
                    on_main(accelerator, partial(self._report, line, progress))
                    if self._due(knobs.evaluate_every):
                        self._evaluate(progress)
                        ended = self._finished()
                    asked = any_process(accelerator, interrupt.asked)
                    self.owes_save |= asked or self._due(knobs.checkpoint_every)
                    self._save()
                    if asked:
                        raise KeyboardInterrupt
        finally:
            if self.metrics is not None:
                self.metrics.close()
            for tracker in self.trackers:
                tracker.close()
        self.owes_save = True
        self._save()

    def _finished(self) -> bool:
        """Whether the stage ends here; the main process knows."""
        ended = self.accelerator.is_main_process and self.stage.finished is not None and self.stage.finished()
        return any_process(self.accelerator, ended)

    def _open_metrics(self) -> None:
        self.metrics = MetricLog(self.run / METRICS)
        self.metrics.truncate_after(self.counters["step"])
        record = (read_run(self.run) or {}).get("config", {})
        self.trackers = open_trackers(self.knobs.trackers, self.run, record, self.counters["step"])
        for tracker in self.trackers:
            self.metrics.listeners.append(partial(_show, tracker))

    def _report(self, line: dict[str, Any], progress: TrainingProgress) -> None:
        assert self.metrics is not None
        self.metrics.write(kind="train", **line, total_tokens=self.stage.total_tokens)
        progress.update(
            line["tokens"],
            line["phase"],
            line["block_size"],
            line["loss"],
            line["masked_accuracy"],
            line["tokens_per_second"],
        )

    def _due(self, every: int) -> bool:
        return self.counters["step"] % every == 0 or self.counters["tokens"] >= self.stage.total_tokens

    def _step(self) -> dict[str, Any]:
        started, counters, accelerator = time.perf_counter(), self.counters, self.accelerator
        rung = self.stage.rung(counters["tokens"])
        progress = counters["tokens"] / self.stage.total_tokens
        views, positions, real = self._window_views(rung)
        shift = self.plain.model.card.shift
        count = sum(int(targets(view.maskable, view.position, shift).sum()) for *_, view in views)
        totals = summed(accelerator, torch.tensor([count * self.stage.turns, positions, real]))
        normaliser, positions, real = totals.tolist()
        if normaliser == 0:
            raise TrainingStopped("a step has no token to predict", "check the data: documents of one token?")
        rate = self.knobs.learning_rate.at(progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        window = self._forward_backward(views, normaliser, progress)
        norm = window.read(clip_gradients(accelerator, self.module, self.knobs.clip))
        sums = self._reduced(window)
        loss = sums.pop("total") / normaliser
        self.guard.check(counters["step"] + 1, rung.block_size, loss, norm)
        with self.resting.awake() if self.resting is not None else nullcontext():
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        for name, more in (("step", 1), ("tokens", positions), ("real_tokens", real), ("seconds", seconds)):
            counters[name] += more
        masked, correct = sums.pop("masked"), sums.pop("correct")
        return {
            **{name: counters[name] for name in ("step", "tokens", "real_tokens")},
            "phase": rung.phase, "block_size": rung.block_size,
            "learning_rate": rate, "loss": loss, "losses": {name: value / normaliser for name, value in sums.items()},
            "masked_accuracy": sum(correct) / max(sum(masked), 1),
            "accuracy_by_t": {b: (c / m if m else None) for b, c, m in zip(BUCKETS, correct, masked, strict=True)},
            "gradient_norm": norm, "tokens_per_second": positions / seconds, "seconds": seconds,
        }  # fmt: skip

    def _window_views(self, rung: Rung) -> tuple[list[tuple[int, int, View]], int, int]:
        """This process's views of the step, each after its global micro-batch and its number in there; the positions
        and the real tokens of the data in them."""
        accelerator, knobs = self.accelerator, self.knobs
        views: list[tuple[int, int, View]] = []
        positions, real = 0, 0
        for micro in range(knobs.accumulate):
            window = self.counters["step"] * knobs.accumulate + micro
            index = window * accelerator.num_processes + accelerator.process_index
            found = self.stage.views(index, rung)
            first = found[0]
            positions += int((first.document >= 0).sum())
            real += real_tokens(first.clean, first.document, first.position, self.stage.pad_id)
            views.extend((index, number, view) for number, view in enumerate(found))
        return views, positions, real

    def _forward_backward(self, views: list[tuple[int, int, View]], normaliser: int, progress: float) -> _Window:
        accelerator, window, mask_noise = self.accelerator, _Window(), self.knobs.mask_noise.at(progress)
        forwards = [(*place, turn) for place in views for turn in range(self.stage.turns)]
        view = views[0][2]
        for done, (index, number, start, turn) in enumerate(forwards, 1):
            view = start if turn == 0 else view
            generator = make_generator(self.stage.seed, 3, index, number, turn)
            teacher = self.stage.teacher(view) if self.stage.teacher is not None else None
            wants_draft = turn + 1 < self.stage.turns
            # In pieces each gradient is cut up at once: whole ones, kept for the window, are as large as the model.
            keeps = done < len(forwards) and self.shards is None
            with accelerator.no_sync(self.module) if keeps else accelerator.autocast():
                with accelerator.autocast():
                    outcome = self.module(view, mask_noise, generator, teacher, wants_draft, progress)
                loss = outcome.total * (accelerator.num_processes / normaliser)
                if outcome.auxiliary is not None:  # gradients are averaged over processes already
                    loss = loss + outcome.auxiliary / len(forwards)
                accelerator.backward(loss)
            window.add(outcome, normaliser / (len(forwards) * accelerator.num_processes))
            if wants_draft and outcome.draft is not None:
                view = next_turn(view, outcome.draft.to(view.clean.device), self.plain.model.card.mask_id)
        return window

    def _reduced(self, window: _Window) -> dict[str, Any]:
        names = sorted(window.losses)
        numbers = [window.total, *(window.losses[n] for n in names), *window.correct, *window.masked]
        flat = torch.tensor(numbers, dtype=torch.float64)
        values = summed(self.accelerator, flat).tolist()
        buckets = len(BUCKETS)
        return {
            "total": values[0],
            **dict(zip(names, values[1 : 1 + len(names)], strict=True)),
            "correct": [int(x) for x in values[-2 * buckets : -buckets]],
            "masked": [int(x) for x in values[-buckets:]],
        }

    def _evaluate(self, progress: TrainingProgress) -> None:
        if self.stage.validate is None:
            return
        self.module.eval()
        if self.shards is None:
            on_main(self.accelerator, lambda: self._note(self._measured(), progress))
        else:
            with self.shards.readable():
                found = self._measured()
            self.shards.gather()
            on_main(self.accelerator, lambda: self._note(found, progress))
        self.module.train()

    def _measured(self) -> dict[str, Any]:
        assert self.stage.validate is not None
        with torch.no_grad(), self.accelerator.autocast():
            return self.stage.validate(self.plain, self.counters["step"])

    def _note(self, found: dict[str, Any], progress: TrainingProgress) -> None:
        assert self.metrics is not None
        step, tokens = self.counters["step"], self.counters["tokens"]
        self.metrics.write(kind="eval", step=step, tokens=tokens, **found)
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in found.items() if isinstance(value, float))
        progress.say(f"step {step}: {numbers}")
        if self.stage.on_evaluation is not None:
            self.stage.on_evaluation(step, found)
        for sample in self.stage.samples(step) if self.stage.samples is not None else []:
            self.metrics.write(kind="sample", step=step, **sample)
            progress.say("\n".join(f"  {name}: {value}" for name, value in sample.items()))

    def _save(self) -> None:
        """Save the state where that is due; weights that a spike has just moved are not, the next calm step is."""
        if not self.owes_save:
            return
        if not self.guard.calm:
            logger.info("step %d is a spike of the loss; the state before it stays", self.counters["step"])
            return
        self.owes_save = False
        if self.saved_step != self.counters["step"]:
            gather = partial(gather_state, self.plain, self.bare_optimizer, keep=self.accelerator.is_main_process)
            held = gather() if self.shards is not None else None  # of pieces every process brings its own
            on_main(self.accelerator, lambda: self._save_state(gather() if held is None else held))
            self.saved_step = self.counters["step"]

    def _save_state(self, held: Held) -> None:
        state = {**self.counters, "guard": self.guard.state(), "stage": self.stage.counters}
        save_state(self.run, held, state)
        if self.stage.on_saved is not None:
            self.stage.on_saved()
