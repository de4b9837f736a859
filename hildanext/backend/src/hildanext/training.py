"""The training loop, used by every stage: accumulate, clip, guard, log, checkpoint, resume.

A stage hands in a `TrainingTask`: which block size now, which views for a micro-batch, what to validate. A global step
is one update of the optimiser; it takes a gradient accumulation window of `accumulate` micro-batches in each process.
Views are a pure function of the micro-batch's global index, so a resumed run, and a run on two processes with half
the accumulation, see the same data and the same noise. Where views are made, as the answers of a policy are, the task
hands in windows as a whole.
"""

import logging
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from jaxtyping import Float
from torch import Tensor

from hildanext.core.errors import TrainingStopped
from hildanext.core.metrics_log import METRICS, MetricLog
from hildanext.core.progress import ProgressLine
from hildanext.core.run_dir import read_run, recover_folder
from hildanext.core.runtime import keep_freed_memory, make_generator
from hildanext.core.tracking import Tracker, open_trackers, scalars
from hildanext.diffusion import next_turn
from hildanext.losses import Outcome, TrainingStep
from hildanext.trainer.config import TrainConfig
from hildanext.trainer.guard import Guard
from hildanext.trainer.interrupt import between_steps
from hildanext.trainer.optimizer import OffloadedStates, build_optimizer
from hildanext.trainer.processes import any_process, check_agreement, largest, on_main, open_accelerator, summed
from hildanext.trainer.sharded import Shards, clip_gradients, open_shards
from hildanext.trainer.state import STATE, Held, gather_state, load_state, save_state, trainable
from hildanext.trainer.task import TrainingTask
from hildanext.trainer.window import DataWindows, Place, Window, WindowSource

logger = logging.getLogger(__name__)

UNITS = {"tokens": "tok", "mask_positions": "masks"}


@dataclass
class _WindowSums:
    """Sums over the forwards of this process's gradient accumulation window.

    They are read once, when the window ends: the host waits for the device wherever it reads a number.
    """

    parts: list[tuple[str, float, bool]] = field(default_factory=list)
    """Of each scalar: the loss it belongs to ("" for none), its share, and whether it is part of the total."""
    scalars: list[Tensor] = field(default_factory=list)
    hits: Tensor | None = None
    """Right ones and masked tokens, [2 buckets]."""

    def add(self, outcome: Outcome, share: float) -> None:
        """`share` is what a loss that is an average already counts for, so that the normaliser divides it away."""
        rows = [("", 1.0, True, outcome.total.detach())]
        rows += [(name, 1.0, False, value) for name, value in outcome.losses.items()]
        rows += [(name, share, True, value) for name, value in outcome.averages.items()]
        self.parts += [(name, weight, in_total) for name, weight, in_total, _ in rows]
        self.scalars += [value for *_, value in rows]
        hits = torch.stack([outcome.correct, outcome.masked])
        self.hits = hits if self.hits is None else self.hits + hits

    def read(self, norm: Float[Tensor, ""]) -> tuple[float, dict[str, float], list[list[int]], float]:
        """The total, each loss, the right and the masked ones by bucket, and the gradients' norm: the one point
        of a step where the host waits for the device."""
        assert self.hits is not None
        wide = torch.float32 if norm.device.type == "mps" else torch.float64  # MPS has no fp64
        scalars = torch.stack([value.to(wide) for value in (*self.scalars, norm.to(self.hits.device))])
        values: list[float] = torch.cat([scalars, self.hits.flatten().to(wide)]).tolist()
        count = len(self.scalars)
        total, losses = 0.0, dict[str, float]()
        for (name, weight, in_total), value in zip(self.parts, values[:count], strict=True):
            total += weight * value if in_total else 0.0
            if name:
                losses[name] = losses.get(name, 0.0) + weight * value
        hits = [int(value) for value in values[count + 1 :]]
        half = len(hits) // 2
        return total, losses, [hits[:half], hits[half:]], values[count]


def make_optimizer(module: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser of the knobs over what learns in a module. Raises `ConfigError`."""
    rate = config.learning_rate.peak
    return build_optimizer(config.optimizer, trainable(module), rate, config.betas, config.weight_decay)


def train(
    step_module: TrainingStep,
    task: TrainingTask,
    config: TrainConfig,
    run: Path,
    quiet: bool = False,
    accelerator: Accelerator | None = None,
) -> dict[str, Any]:
    """Train until the task's total is reached; resumes where `run` has a state. Returns the counters.

    `tokens` are positions of documents: what is computed, the padding of last blocks included, a complementary pair
    counted once. `real_tokens` leaves the padding out. `mask_positions` are the masks that were learnt. The schedules
    speak of the task's unit, tokens or mask positions.
    `accelerator` is the one whose device the model is on; None opens one.

    Raises `TrainingStopped` when a guard trips and `CheckpointError` when the disk is full; in both cases
    the last whole checkpoint stays. Ctrl-C ends the run after the step it falls in, which is saved.
    """
    if not keep_freed_memory():
        logger.info("this C library hands freed memory back at once; steps on a CPU are somewhat slower for it")
    if accelerator is None:
        accelerator = open_accelerator(config.precision, str(step_module.model.device))
    if config.gradient_checkpointing:
        step_module.model.recompute_layers()
        # Autocast would keep each weight's narrow copy until the forward ends; recomputing is there to keep nothing.
        accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
    shards = open_shards(accelerator, step_module, config, task.teacher is not None)
    unwrapped = step_module if shards is None else shards.module
    optimizer = make_optimizer(unwrapped, config)
    on_main(accelerator, lambda: recover_folder(run / STATE))
    saved = load_state(run, unwrapped, optimizer)
    counters = {
        "step": 0,
        "tokens": 0,
        "real_tokens": 0,
        "mask_positions": 0,
        "seconds": 0.0,
        **(saved if saved is not None else {}),
    }
    check_agreement(accelerator, counters["step"])
    task.callbacks.state.update(counters.get("stage", {}))
    guard = Guard(config.guard)
    if "guard" in counters:
        guard.restore(counters["guard"])
    module, optimizer = accelerator.prepare(unwrapped, optimizer) if shards is None else (unwrapped, optimizer)
    loop = _Loop(accelerator, module, unwrapped, optimizer, task, config, run, guard, counters, shards)
    loop.saved_step = None if saved is None else counters["step"]
    if shards is not None and task.callbacks.samples is not None:
        task.callbacks.samples = None  # the whole model rests on a CPU, where writing would take for ever
        logger.warning("a sharded run writes no samples while it trains")
    if config.offload is not None:
        loop.offloaded = OffloadedStates(loop.bare_optimizer, accelerator.device)
        loop.offloaded.offload()
    loop.run_to_end(quiet)
    if shards is not None:
        shards.end()
    return counters


def _show(tracker: Tracker, line: Mapping[str, Any]) -> None:
    tracker.log(int(line["step"]), scalars(line))


def _told(line: Mapping[str, Any], unit: str) -> str:
    """What is shown of a supervised step."""
    return (
        f"{line['phase']} block {line['block_size']} | loss {line['loss']:.3f} | "
        f"masked acc {line['masked_accuracy']:.1%} | {line[f'{unit}_per_second']:.0f} {UNITS[unit]}/s"
    )


class _Loop:
    def __init__(
        self,
        accelerator: Accelerator,
        module: Any,
        step_module: TrainingStep,
        optimizer: Any,
        task: TrainingTask,
        config: TrainConfig,
        run: Path,
        guard: Guard,
        counters: dict[str, Any],
        shards: Shards | None = None,
    ) -> None:
        self.accelerator, self.module, self.unwrapped, self.optimizer = accelerator, module, step_module, optimizer
        self.task, self.config, self.run, self.guard, self.counters = task, config, run, guard, counters
        self.callbacks = task.callbacks
        self.shards = shards
        self.saved_step: int | None = None
        self.owes_save = False
        self.metrics: MetricLog | None = None
        self.trackers: list[Tracker] = []
        self.offloaded: OffloadedStates | None = None
        self.bare_optimizer: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self.place = Place(accelerator.process_index, accelerator.num_processes)
        self.windows: WindowSource
        if task.windows is not None:
            self.windows = task.windows
        else:
            assert task.views is not None, "a task has views or windows"
            self.windows = DataWindows(task.views, config.accumulate, task.pad_id)

    def run_to_end(self, quiet: bool) -> None:
        counters, config, accelerator = self.counters, self.config, self.accelerator
        last = config.stop_after if config.stop_after is not None else 2**62
        on_main(accelerator, self._open_metrics)
        self.module.train()
        quiet = quiet or not accelerator.is_main_process
        progress = ProgressLine(self.task.total, self.task.unit.replace("_", " "), done=self._done, quiet=quiet)
        try:
            with between_steps() as interrupt, progress:
                ended = self._finished()
                while self._done < self.task.total and counters["step"] < last and not ended:
                    line = self._step()
                    on_main(accelerator, partial(self._report, line, progress))
                    if self._due(config.evaluate_every):
                        with progress.evaluation():
                            self._evaluate(progress)
                        ended = self._finished()
                    # One process may be told to stop alone; all must leave the loop after the same step.
                    interrupted = any_process(accelerator, interrupt.asked)
                    self.owes_save |= interrupted or self._due(config.checkpoint_every)
                    self._save()
                    if interrupted:
                        raise KeyboardInterrupt
        finally:
            if self.metrics is not None:
                self.metrics.close()
            for tracker in self.trackers:
                tracker.close()
        self.owes_save = True
        self._save()

    @property
    def _done(self) -> int:
        """Of the task's total."""
        done: int = self.counters[self.task.unit]
        return done

    def _finished(self) -> bool:
        """Whether the training ends here; the main process knows."""
        finished = self.callbacks.finished
        ended = self.accelerator.is_main_process and finished is not None and finished()
        return any_process(self.accelerator, ended)

    def _open_metrics(self) -> None:
        self.metrics = MetricLog(self.run / METRICS)
        self.metrics.truncate_after(self.counters["step"])
        record = (read_run(self.run) or {}).get("config", {})
        self.trackers = open_trackers(self.config.trackers, self.run, record, self.counters["step"])
        for tracker in self.trackers:
            self.metrics.listeners.append(partial(_show, tracker))
        if self.callbacks.watch is not None:
            self.callbacks.watch(self.metrics)

    def _report(self, line: dict[str, Any], progress: ProgressLine) -> None:
        assert self.metrics is not None
        self.metrics.write(kind="train", **line, **{f"total_{self.task.unit}": self.task.total})
        progress.breaks_left = self._evaluations_left()
        told = self.task.told if self.task.told is not None else partial(_told, unit=self.task.unit)
        progress.update(self._done, told(line))

    def _due(self, every: int) -> bool:
        return self.counters["step"] % every == 0 or self._done >= self.task.total

    def _evaluations_left(self) -> int:
        """As far as the steps so far tell how many there will be; the one at the end is among them."""
        counters, every = self.counters, self.config.evaluate_every
        if self.task.validate is None:
            return 0
        steps = math.ceil(self.task.total / self._done * counters["step"])
        return math.ceil(steps / every) - (counters["step"] - 1) // every

    def _step(self) -> dict[str, Any]:
        started, counters, accelerator = time.perf_counter(), self.counters, self.accelerator
        block_phase = self.task.block_phase(self._done)
        progress = self._done / self.task.total
        window = self.windows(counters["step"], block_phase, self.place)
        made = time.perf_counter()
        # Losses are sums over tokens, divided by what the whole global step may predict: micro-batches of different
        # lengths then weigh as they would in one large batch.
        count = torch.stack([torch.as_tensor(self.unwrapped.countable(view)) for *_, view in window.views]).sum()
        totals = summed(accelerator, torch.stack([count * self.task.turns, window.positions, window.real]))
        normaliser, positions, real = totals.tolist()  # views lie on the host: nobody waits for a device here
        rate = self.config.learning_rate.at(progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums = self._update(window, normaliser, progress, block_phase.block_size)
        loss, norm = sums.pop("total", 0.0), sums.pop("norm", 0.0)
        ended = time.perf_counter()
        seconds = ended - started
        masked, correct = sums.pop("masked", []), sums.pop("correct", [])
        more = {"step": 1, "tokens": positions, "real_tokens": real, "mask_positions": sum(masked), "seconds": seconds}
        for name, count_of in more.items():
            counters[name] += count_of
        return {
            **{name: counters[name] for name in ("step", "tokens", "real_tokens", "mask_positions")},
            "phase": block_phase.phase, "block_size": block_phase.block_size,
            "learning_rate": rate, "loss": loss, "losses": sums,
            **self._accuracy(masked, correct),
            "gradient_norm": norm, "tokens_per_second": positions / seconds,
            "mask_positions_per_second": sum(masked) / seconds, "seconds": seconds,
            **({} if self.task.windows is None else {"seconds_update": ended - made}),
            **({"step_per_second": 1 / seconds} if self.task.unit == "step" else {}),
            **window.figures,
            **largest(accelerator, self.unwrapped.extremes()),
        }  # fmt: skip

    def _update(self, window: Window, normaliser: int, progress: float, block_size: int) -> dict[str, Any]:
        """Move the weights by a window's losses, and say what these are, divided by the normaliser."""
        if normaliser == 0:
            if self.task.windows is not None:
                return {}  # no answer of it teaches anything: that is no fault
            raise TrainingStopped("a step has no token to predict", "check the data: documents of one token?")
        window_sums = self._forward_backward(window.views, normaliser, progress)
        sums = self._reduced(window_sums, clip_gradients(self.accelerator, self.module, self.config.clip))
        norm, counts = sums.pop("norm"), {name: sums.pop(name) for name in ("masked", "correct")}
        sums = {name: value / normaliser for name, value in sums.items()}
        self.guard.check(self.counters["step"] + 1, block_size, sums["total"], norm, self.unwrapped.guarded)
        with self.offloaded.onload() if self.offloaded is not None else nullcontext():
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return {**sums, **counts, "norm": norm}

    def _accuracy(self, masked: list[int], correct: list[int]) -> dict[str, Any]:
        """Of predictions at masks, where the step counts them."""
        buckets = self.unwrapped.buckets
        if not buckets:
            return {}
        by_bucket = {name: (c / m if m else None) for name, c, m in zip(buckets, correct, masked, strict=True)}
        overall = sum(correct) / max(sum(masked), 1)
        return {"masked_accuracy": overall, f"accuracy_by_{self.unwrapped.by}": by_bucket}

    def _forward_backward(self, views: list[tuple[int, int, Any]], normaliser: int, progress: float) -> _WindowSums:
        accelerator, sums, mask_noise = self.accelerator, _WindowSums(), self.config.mask_noise.at(progress)
        forwards = [(*place, turn) for place in views for turn in range(self.task.turns)]
        view = views[0][2]
        for done, (index, number, start, turn) in enumerate(forwards, 1):
            view = start if turn == 0 else view
            generator = make_generator(self.task.seed, 3, index, number, turn)
            teacher = self.task.teacher(view) if self.task.teacher is not None else None
            wants_draft = turn + 1 < self.task.turns
            # In pieces each gradient is cut up at once: whole ones, kept for the window, are as large as the model.
            accumulates = done < len(forwards) and self.shards is None
            with accelerator.no_sync(self.module) if accumulates else accelerator.autocast():
                with accelerator.autocast():
                    outcome = self.module(view, mask_noise, generator, teacher, wants_draft, progress)
                loss = outcome.total * (accelerator.num_processes / normaliser)
                if outcome.auxiliary is not None:  # gradients are averaged over processes already
                    loss = loss + outcome.auxiliary / len(forwards)
                accelerator.backward(loss)
            sums.add(outcome, normaliser / (len(forwards) * accelerator.num_processes))
            if wants_draft and outcome.draft is not None:
                view = next_turn(view, outcome.draft.to(view.clean.device), self.unwrapped.model.card.mask_id)
        return sums

    def _reduced(self, window: _WindowSums, gradient_norm: Float[Tensor, ""]) -> dict[str, Any]:
        total, losses, hits, norm = window.read(gradient_norm)
        names = sorted(losses)
        flat = torch.tensor([total, *(losses[name] for name in names), *hits[0], *hits[1]], dtype=torch.float64)
        values = summed(self.accelerator, flat).tolist()
        buckets = len(self.unwrapped.buckets)
        buckets_end = len(values) - buckets
        return {
            "total": values[0],
            "norm": norm,
            **dict(zip(names, values[1 : 1 + len(names)], strict=True)),
            "correct": [int(x) for x in values[buckets_end - buckets : buckets_end]],
            "masked": [int(x) for x in values[buckets_end:]],
        }

    def _evaluate(self, progress: ProgressLine) -> None:
        if self.task.validate is None:
            return
        self.module.eval()
        if self.shards is None:
            on_main(self.accelerator, lambda: self._note(self._measured(), progress))
        else:
            with self.shards.readable():
                measured = self._measured()
            self.shards.gather()
            on_main(self.accelerator, lambda: self._note(measured, progress))
        self.module.train()

    def _measured(self) -> dict[str, Any]:
        assert self.task.validate is not None
        with torch.no_grad(), self.accelerator.autocast():
            return self.task.validate(self.unwrapped, self.counters["step"])

    def _note(self, measured: dict[str, Any], progress: ProgressLine) -> None:
        assert self.metrics is not None
        step = self.counters["step"]
        measured = {**{name: self.counters[name] for name in ("tokens", "mask_positions")}, **measured}
        self.metrics.write(kind="eval", step=step, **measured)
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in measured.items() if isinstance(value, float))
        progress.say(f"step {step}: {numbers}")
        if self.callbacks.on_evaluation is not None:
            self.callbacks.on_evaluation(step, measured)
        for sample in self.callbacks.samples(step) if self.callbacks.samples is not None else []:
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
            gather = partial(gather_state, self.unwrapped, self.bare_optimizer, keep=self.accelerator.is_main_process)
            held = gather() if self.shards is not None else None  # of pieces every process brings its own
            on_main(self.accelerator, lambda: self._save_state(gather() if held is None else held))
            self.saved_step = self.counters["step"]

    def _save_state(self, held: Held) -> None:
        state = {**self.counters, "guard": self.guard.state(), "stage": self.callbacks.state}
        save_state(self.run, held, state)
        if self.callbacks.on_saved is not None:
            self.callbacks.on_saved()
