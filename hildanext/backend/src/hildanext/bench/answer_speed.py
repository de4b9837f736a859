"""How much faster a step of fine-tuning is when only what a prediction depends on is doubled.

Steps as `hildanext sft` takes them (complementary views, the multi-turn forward, the optimiser), on conversations laid
out as it lays them out, once with both copies of every token and once without the copies that no prediction depends on
(`hildanext.corruption.input_layout`), in turns. Data tokens are positions of conversations, each counted once whatever
is fed.
"""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from rich.table import Table

from hildanext.bench.train_speed import Seconds, medians
from hildanext.core.config import Seed, config, plain, validate
from hildanext.core.errors import ConfigError
from hildanext.core.progress import Repeats
from hildanext.core.runtime import accelerates_bf16, machine, make_generator
from hildanext.corruption.input_layout import LayoutChoice, choose_layout
from hildanext.corruption.noised_batches import NoisedBatches
from hildanext.corruption.schedules import BlockPhase
from hildanext.data.chat_dataset import ChatDataConfig, ChatDataset, prepare_chat
from hildanext.data.chat_template import set_template
from hildanext.diffusion import NoisedBatch, next_turn
from hildanext.losses import SupervisedStep, make_losses
from hildanext.models import DiffusionModel
from hildanext.sft_stage1 import SftConfig
from hildanext.tokenization import real_ids
from hildanext.trainer.config import TrainConfig
from hildanext.training import make_optimizer

LAYOUTS: tuple[LayoutChoice, ...] = ("double", "response")


@config
class AnswerSpeedConfig:
    """The shape of a step; everything else is as `hildanext sft` has it by default."""

    data: dict[str, Any]
    """As the section of conversations of a run: `{"train": {"name": one of CHATS, config}, ...}`."""
    batch_size: int = Field(default=1, ge=1)
    accumulate: int = Field(default=2, ge=1)
    repeats: int = Field(default=3, ge=1)
    precision: str = "auto"
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.precision not in ("auto", "bf16", "no"):
            raise ConfigError(f"precision {self.precision!r}", "choices: auto, bf16, no")


def measure(
    model: DiffusionModel, tokenizer: Any, settings: AnswerSpeedConfig, say: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Steps under both layouts, in turns, on the same conversations and noise; medians. The weights stay as they are.

    Raises `ConfigError` and `DataError` as the preparation of conversations does.
    """
    data = validate(ChatDataConfig, settings.data, "bench.data")
    set_template(tokenizer, data.template, data.template_options)
    recipe = SftConfig(model="measured")
    steps = {layout: SupervisedStep(model, make_losses(recipe.losses, "losses"), layout=layout) for layout in LAYOUTS}
    for step in steps.values():
        step.chunk = TrainConfig().chunk
    optimizer = make_optimizer(steps["double"], replace(TrainConfig(), weight_decay=0.0))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    wide = settings.precision == "no" or (settings.precision == "auto" and not accelerates_bf16(model.device))
    times: dict[str, list[Seconds]] = {layout: [] for layout in LAYOUTS}
    counts: dict[str, list[int]] = {name: [] for name in ("tokens", "answers", *LAYOUTS)}
    losses: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    model.train()
    with tempfile.TemporaryDirectory() as folder:
        micro_batches = _micro_batches(model, tokenizer, data, recipe, settings, Path(folder))
        repeats = Repeats(settings.repeats, say)
        for repeat in range(settings.repeats + 1):
            window = [micro_batches(repeat * settings.accumulate + micro) for micro in range(settings.accumulate)]
            for layout, step in steps.items():
                begun = Seconds.now(model.device)
                autocast = nullcontext() if wide else torch.autocast(model.device.type, dtype=torch.bfloat16)
                losses[layout].append(_step(step, optimizer, window, recipe.turns, autocast))
                if repeat > 0:  # the first of each pays for allocations
                    times[layout].append(Seconds.now(model.device).since(begun))
            if repeat > 0:
                _count(counts, window, model)
                repeats.done(repeat)
    rows = {name: value for name, value in plain(data).items() if name not in ("train", "valid")}
    return _result(model, settings, rows, times, counts, losses, wide)


def _micro_batches(
    model: DiffusionModel,
    tokenizer: Any,
    data: ChatDataConfig,
    recipe: SftConfig,
    settings: AnswerSpeedConfig,
    folder: Path,
) -> Callable[[int], list[NoisedBatch]]:
    """Number of a micro-batch -> its noised views."""
    block, eos = model.card.block_size, int(tokenizer.eos_token_id)
    prepare_chat(folder / "data", data, tokenizer, block)
    dataset = ChatDataset(folder / "data", "train", data.sequence_length, block, eos, data.packing)
    real = real_ids(model.card, tokenizer).nonzero()[:, 0]
    views = NoisedBatches(dataset, settings.batch_size, recipe, model.card, real, settings.seed)
    block_phase = BlockPhase(phase="stable", block_size=block, tokens=1)
    return lambda number: views(number, block_phase)


def _step(
    step: SupervisedStep,
    optimizer: torch.optim.Optimizer,
    window: Sequence[Sequence[NoisedBatch]],
    turns: int,
    autocast: Any,
) -> float:
    """One optimiser step over the views of a window, each `turns` times; returns the loss."""
    total, normaliser = 0.0, sum(int(view.maskable.sum()) for views in window for view in views) * turns
    for micro, views in enumerate(window):
        for number, view in enumerate(views):
            for turn in range(turns):
                generator = make_generator(0, micro, number, turn)
                with autocast:
                    outcome = step(view, generator=generator, wants_draft=turn + 1 < turns)
                (outcome.total / normaliser).backward()
                total += float(outcome.total.detach()) / normaliser
                if outcome.draft is not None:
                    view = next_turn(view, outcome.draft, step.model.card.mask_id)
    torch.nn.utils.clip_grad_norm_(step.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def _count(counts: dict[str, list[int]], window: Sequence[Sequence[NoisedBatch]], model: DiffusionModel) -> None:
    firsts = [views[0] for views in window]
    counts["tokens"].append(sum(int((view.document >= 0).sum()) for view in firsts))
    counts["answers"].append(sum(int(view.maskable.sum()) for view in firsts))
    for layout in LAYOUTS:
        fed = (choose_layout(view, model.card.shift, choice=layout) for view in firsts)
        counts[layout].append(sum(columns.token.numel() for columns in fed))


def _result(
    model: DiffusionModel,
    settings: AnswerSpeedConfig,
    rows: dict[str, Any],
    times: dict[str, list[Seconds]],
    counts: dict[str, list[int]],
    losses: dict[str, list[float]],
    wide: bool,
) -> dict[str, Any]:
    tokens = statistics.mean(counts["tokens"])
    layouts: dict[str, dict[str, Any]] = {
        layout: {
            "step_ms": 1000 * medians(steps).wall,
            "step_processor_ms": 1000 * medians(steps).processor,
            "tokens_per_second": statistics.median(n / s.wall for n, s in zip(counts["tokens"], steps, strict=True)),
            "columns": statistics.mean(counts[layout]),
            "losses": losses[layout],
        }
        for layout, steps in times.items()
    }
    pairs = list(zip(times["double"], times["response"], strict=True))
    return {
        "bench": "train",
        "what": "answers",
        "card": plain(model.card),
        "settings": {**plain(settings), "data": rows},
        "machine": machine(model.device, torch.float32 if wide else torch.bfloat16),
        "tokens_per_step": tokens,
        "share_of_answers": statistics.mean(counts["answers"]) / tokens,
        "ways": layouts,
        "columns_ratio": layouts["double"]["columns"] / layouts["response"]["columns"],
        "speedup": statistics.median(a.wall / b.wall for a, b in pairs),
        "speedup_processor": statistics.median(a.processor / b.processor for a, b in pairs),
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """One line for each layout."""
    settings, ran_on = result["settings"], result["machine"]
    table = Table(
        title=f"A step of fine-tuning: {settings['accumulate']} x {settings['batch_size']} rows, "
        f"block {result['card']['block_size']}, {ran_on['dtype']}, {ran_on['threads']} threads",
        title_justify="left",
    )
    for column in ("", "ms/step", "data tokens/s", "columns of a forward"):
        table.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
    names = {"double": "both copies of every token", "response": "what predictions depend on"}
    for layout, way in result["ways"].items():
        cells = (f"{way['step_ms']:.0f}", f"{way['tokens_per_second']:.1f}", f"{way['columns']:.0f}")
        table.add_row(names[layout], *cells)
    table.caption = (
        f"{result['speedup']:.2f} times as fast, {result['speedup_processor']:.2f} in processor time; "
        f"{100 * result['share_of_answers']:.0f} % of the tokens are learnt"
    )
    return [table]
