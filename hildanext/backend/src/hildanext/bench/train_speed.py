"""How fast a training step is, against what this machine's matrix products allow and against a plain implementation.

Model FLOP of a step = 6 * N_body * tokens fed (two copies of each data token) + 6 * V * h * supervised rows
+ attention, 12 * (query, key) pairs the mask allows * heads * head_dim * layers. N_body counts the matrices of the
backbone without the embedding. The FLOP are what the method needs, the same for both implementations: work that the
plain one adds (logits nobody asked for, masked pairs) earns it nothing. On a CPU the processor's time is taken beside
the clock's: it does not count what other programs were given.

Beside it runs the step of a parent that stays (`convert.keep_parent`) on the same rows: masks are what both learn from,
so they are compared by the time a mask takes, and by memory.
"""

import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from pydantic import Field
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from hildanext import masks
from hildanext.bench.decode_speed import finish
from hildanext.bench.step_memory import added_bytes, standing_bytes
from hildanext.core.config import RowLength, Seed, config, plain
from hildanext.core.errors import ConfigError
from hildanext.core.progress import Repeats
from hildanext.core.runtime import accelerates_bf16, machine
from hildanext.corruption.anchors import draw_groups
from hildanext.corruption.input_layout import build_layout
from hildanext.diffusion import SMALLEST_TIME, NoisedBatch, block_index, block_times, elbo_weight, mask_tokens, targets
from hildanext.losses import SupervisedStep, TrainingStep
from hildanext.losses.draft import DraftLossConfig, DraftStep
from hildanext.losses.mask_to_token import MaskToToken
from hildanext.models import DiffusionModel
from hildanext.models.drafter import Drafter
from hildanext.models.gated_lora import GatedLoraConfig
from hildanext.trainer.config import TrainConfig
from hildanext.training import make_optimizer


@config
class TrainSpeedConfig:
    """The shape of a step; the data is random tokens, one document a row."""

    sequence_length: RowLength = 256
    block_size: int = Field(default=32, ge=1)
    batch_size: int = Field(default=4, ge=1)
    repeats: int = Field(default=5, ge=1)
    plain: bool = True
    """Also measure the plain implementation (it needs memory for the logits of all 2L positions)."""
    kept: bool = True
    """Also measure the step of a parent that stays."""
    places: int = Field(default=4, ge=1, le=16)
    """Masks of a group in that step."""
    groups: int = Field(default=64, ge=1)
    """Groups in a row of that step."""
    precision: str = "auto"
    """Autocast of the fast step: auto, bf16 or no. The plain one is fp32."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.sequence_length % self.block_size:
            raise ConfigError(
                f"block size {self.block_size} does not divide the sequence length {self.sequence_length}",
                "choose a block size that divides it",
            )
        if self.precision not in ("auto", "bf16", "no"):
            raise ConfigError(f"precision {self.precision!r}", "choices: auto, bf16, no")


@dataclass
class _DenseAttention:
    """As one would write it first: keys repeated for each group, a float mask over all 2L x 2L pairs."""

    mask: Tensor

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        return scaled_dot_product_attention(query, key, value, attn_mask=self.mask, scale=scale)


def plain_loss(model: DiffusionModel, view: NoisedBatch) -> Tensor:
    """The same loss, straightforwardly: one dense mask, logits of every position in fp32, then pick what is needed."""
    card = model.card
    mask = masks.doubled(view.document, view.position, view.block_size, card.clean_mask)
    dense = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(~mask, float("-inf"))[:, None]
    tokens = torch.cat([view.noisy, view.clean], -1)
    positions = torch.cat([view.position, view.position], -1)
    logits = model.logits(model(model.embed(tokens), positions, _DenseAttention(dense)))
    index = build_layout(view, "double").prediction_index(view.position, view.block_size, card.shift)
    read = logits.gather(1, index[..., None].expand(-1, -1, logits.shape[-1]))
    # Unsupervised positions carry weight 0; a banned label cannot occur, so no infinity is multiplied by it.
    losses = cross_entropy(read.flatten(0, 1), view.clean.flatten(), reduction="none").view_as(view.time)
    weight = elbo_weight(view) * targets(view.maskable, view.position, card.shift)
    return (losses * weight).sum()


def model_flop(model: DiffusionModel, view: NoisedBatch) -> dict[str, float]:
    """Floating-point operations of one step (forward and backward), by part."""
    config = model.causal_lm.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fed = 2 * view.clean.numel()
    rows = int((view.masked & targets(view.maskable, view.position, model.card.shift)).sum())
    pairs = int(masks.doubled(view.document, view.position, view.block_size, model.card.clean_mask).sum())
    vocabulary, hidden = model.head.shape
    return {
        "body": 6.0 * sum(count * rows_ * columns for (rows_, columns), count in body_shapes(model).items()) * fed,
        "head": 6.0 * vocabulary * hidden * rows,
        "attention": 12.0 * pairs * config.num_attention_heads * head_dim * config.num_hidden_layers,
    }


def body_shapes(model: DiffusionModel) -> Counter[tuple[int, int]]:
    """(out, in) of the backbone's matrices, and how many there are of each."""
    linears = (module for module in model.causal_lm.model.modules() if isinstance(module, nn.Linear))
    return Counter(tuple(linear.weight.shape) for linear in linears)  # type: ignore[misc]


class Seconds(NamedTuple):
    """By the clock on the wall, and of this process's threads together."""

    wall: float
    processor: float

    @classmethod
    def now(cls, device: torch.device) -> "Seconds":
        finish(device)
        return cls(time.perf_counter(), time.process_time())

    def since(self, begun: "Seconds") -> "Seconds":
        return Seconds(self.wall - begun.wall, max(self.processor - begun.processor, 1e-9))


def medians(samples: Sequence[Seconds]) -> Seconds:
    return Seconds(
        statistics.median(sample.wall for sample in samples), statistics.median(sample.processor for sample in samples)
    )


class MatrixProducts:
    """The matrix products of a step and nothing else: forward, and backward to input and to weight."""

    def __init__(self, model: DiffusionModel, view: NoisedBatch, dtype: torch.dtype) -> None:
        rows = max(int(view.masked.sum()), 1)
        fed = 2 * view.clean.numel()
        vocabulary, hidden = model.head.shape
        self.shapes = [(fed, *shape, count) for shape, count in body_shapes(model).items()]
        self.shapes.append((rows, vocabulary, hidden, 1))

        def random(*size: int) -> Tensor:
            return torch.randn(size, dtype=dtype, device=model.device)

        self.operands = [(random(n, into), random(out, into), random(n, out)) for n, out, into, _ in self.shapes]

    def flop_per_second(self, device: torch.device) -> "Seconds":
        """Operations per second over all products of a step, each shape weighing as often as it occurs."""
        wall = processor = flop = 0.0
        for (x, weight, upstream), (n, outer, inner, count) in zip(self.operands, self.shapes, strict=True):
            begun = Seconds.now(device)
            x @ weight.T
            upstream @ weight
            upstream.T @ x
            taken = Seconds.now(device).since(begun)
            wall, processor = wall + count * taken.wall, processor + count * taken.processor
            flop += 6.0 * n * outer * inner * count
        return Seconds(flop / wall, flop / processor)


def measure(
    model: DiffusionModel, settings: TrainSpeedConfig, say: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Steps of both implementations and the products' rate, in turns; medians. The model's weights change."""
    device = model.device
    wide = settings.precision == "no" or (settings.precision == "auto" and not accelerates_bf16(device))
    step = SupervisedStep(model, {"m2t": MaskToToken()}, chunk=TrainConfig().chunk, layout="double")
    steps: dict[str, TrainingStep] = {"fast": step}
    if settings.kept:
        steps["kept"] = _kept_step(model, settings, torch.float32 if wide else torch.bfloat16)
    optimizers = {name: make_optimizer(one, TrainConfig()) for name, one in steps.items()}
    autocast = nullcontext() if wide else torch.autocast(device.type, dtype=torch.bfloat16)
    times: dict[str, list[Seconds]] = {"fast": [], "plain": [], "kept": []}
    memory: dict[str, dict[str, int | None]] = {}
    rates: list[Seconds] = []
    view = _view(model, settings, 0)
    products = MatrixProducts(model, view, torch.float32 if wide else torch.bfloat16)

    def loss_of(one: TrainingStep) -> Tensor:
        with autocast:
            total: Tensor = one(view, generator=torch.Generator().manual_seed(settings.seed)).total
            return total

    variants: dict[str, Callable[[], Tensor]] = {name: partial(loss_of, one) for name, one in steps.items()}
    if settings.plain:
        variants["plain"] = lambda: plain_loss(model, view)
        optimizers["plain"] = optimizers["fast"]
    model.train()
    repeats = Repeats(settings.repeats, say)
    for repeat in range(settings.repeats + 1):
        for name, loss in variants.items():
            seconds = _timed_step(loss, optimizers[name], device)
            if repeat > 0:  # the first of each pays for allocations
                times[name].append(seconds)
        rates.append(products.flop_per_second(device))
        if repeat > 0:
            repeats.done(repeat)
    for name, one in steps.items():
        added = added_bytes(partial(_timed_step, variants[name], optimizers[name], device), device)
        memory[name] = {"standing": standing_bytes(one, optimizers[name]), "added": added}
    result = _result(model, settings, view, times, medians(rates[1:]), wide)
    return {**result, "kept": _kept_result(settings, view, times, memory) if settings.kept else None}


def _kept_step(model: DiffusionModel, settings: TrainSpeedConfig, dtype: torch.dtype) -> DraftStep:
    """The step of `convert.keep_parent` over a copy of the weights, in the dtype that it keeps them in."""
    drafter = Drafter(copy.deepcopy(model.causal_lm).to(dtype), GatedLoraConfig(), settings.places)
    return DraftStep(drafter, DraftLossConfig(groups=settings.groups), TrainConfig().chunk)


def _kept_result(
    settings: TrainSpeedConfig,
    view: NoisedBatch,
    times: dict[str, list[Seconds]],
    memory: dict[str, dict[str, int | None]],
) -> dict[str, Any]:
    """Both steps by the mask: milliseconds, and bytes of memory."""
    groups = draw_groups(
        view.document, view.maskable, settings.groups, settings.places, torch.Generator().manual_seed(settings.seed)
    )
    masks = {"fast": int(view.masked.sum()), "kept": int(groups.learnt.sum())}
    ways = {}
    for name, count in masks.items():
        median = medians(times[name])
        per_mask = {"ms_per_mask": 1000 * median.wall / count, "processor_ms_per_mask": 1000 * median.processor / count}
        ways[name] = {"step_ms": 1000 * median.wall, "mask_positions": count, **per_mask, "memory": memory[name]}
    keys = ("ms_per_mask", "processor_ms_per_mask")
    faster = {f"speedup_{key}": ways["fast"][key] / ways["kept"][key] for key in keys}  # type: ignore[operator]
    return {"groups": settings.groups, "places": settings.places, "ways": ways, **faster}


def _result(
    model: DiffusionModel,
    settings: TrainSpeedConfig,
    view: NoisedBatch,
    times: dict[str, list[Seconds]],
    rate: Seconds,
    wide: bool,
) -> dict[str, Any]:
    flop = model_flop(model, view)
    total = sum(flop.values())
    measured = {}
    for name, seconds in times.items():
        if seconds and name != "kept":  # its operations are others
            median = medians(seconds)
            measured[name] = {
                "step_ms": 1000 * median.wall,
                "step_processor_ms": 1000 * median.processor,
                "tokens_per_second": view.clean.numel() / median.wall,
                "flop_per_second": total / median.wall,
                "share_of_products": total / median.wall / rate.wall,
                "share_of_products_processor": total / median.processor / rate.processor,
            }
    return {
        "bench": "train",
        "card": plain(model.card),
        "settings": plain(settings),
        "machine": machine(model.device, torch.float32 if wide else torch.bfloat16),
        "flop_per_step": flop,
        "supervised_rows": int(view.masked.sum()),
        "product_flop_per_second": rate.wall,
        "ways": measured,
        "speedup": _ratio(measured, "step_ms"),
        "speedup_processor": _ratio(measured, "step_processor_ms"),
    }


def _ratio(measured: dict[str, dict[str, float]], key: str) -> float | None:
    return measured["plain"][key] / measured["fast"][key] if "plain" in measured else None


def _view(model: DiffusionModel, settings: TrainSpeedConfig, seed: int) -> NoisedBatch:
    generator = torch.Generator().manual_seed(settings.seed + seed)
    shape = (settings.batch_size, settings.sequence_length)
    clean = torch.randint(model.card.vocab_real - 1, shape, generator=generator).to(model.device)
    position = torch.arange(shape[1], device=model.device).expand(shape).contiguous()
    document = torch.zeros_like(position)
    time_ = block_times(block_index(document, position, settings.block_size), (SMALLEST_TIME, 1.0), generator)
    maskable = position > 0
    return mask_tokens(clean, document, position, maskable, time_, settings.block_size, model.card.mask_id, generator)


def _timed_step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, device: torch.device) -> Seconds:
    begun = Seconds.now(device)
    # Scaled down: the random text would otherwise drive the weights somewhere odd within a few steps.
    (loss() * 1e-6).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Seconds.now(device).since(begun)


def tables(result: dict[str, Any]) -> list[Table]:
    """One line for each implementation."""
    ran_on, settings = result["machine"], result["settings"]
    table = Table(
        title=f"A training step: {settings['batch_size']} x {settings['sequence_length']} data tokens, "
        f"block {settings['block_size']}, {ran_on['dtype']}, {ran_on['threads']} threads",
        title_justify="left",
    )
    for column in ("", "ms/step", "data tokens/s", "model GFLOP/s", "of products", "in processor time"):
        table.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
    names = {"fast": "hildanext", "plain": "plain: fp32, full logits, dense mask"}
    for key, numbers in result["ways"].items():
        cells = (
            f"{numbers['step_ms']:.0f}",
            f"{numbers['tokens_per_second']:.0f}",
            f"{numbers['flop_per_second'] / 1e9:.1f}",
        )
        shares = (f"{100 * numbers[share]:.0f} %" for share in ("share_of_products", "share_of_products_processor"))
        table.add_row(names[key], *cells, *shares)
    rate = result["product_flop_per_second"] / 1e9
    table.add_row("matrix products, same shapes", "", "", f"{rate:.1f}", "100 %", "100 %")
    if result["speedup"] is not None:
        processor = f"{result['speedup_processor']:.2f} in processor time"
        table.caption = f"{result['speedup']:.2f} times the plain implementation, {processor}"
    return [table, *([_kept_table(result["kept"])] if result["kept"] is not None else [])]


def _kept_table(kept: dict[str, Any]) -> Table:
    """The ordinary step beside that of a parent that stays."""
    table = Table(
        title=f"By the mask: the ordinary doubled step, and a parent that stays ({kept['groups']} groups of "
        f"{kept['places']} masks in a row)",
        title_justify="left",
    )
    for column in ("", "ms/step", "masks", "ms/mask", "processor ms/mask", "MiB between steps", "MiB more in one"):
        table.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
    names = {"fast": "doubled, every weight learns", "kept": "parent stays, adapters learn"}
    for key, way in kept["ways"].items():
        added = way["memory"]["added"]
        sizes = (f"{way['memory']['standing'] / 2**20:,.0f}", "?" if added is None else f"{added / 2**20:,.0f}")
        times = (f"{way['ms_per_mask']:.2f}", f"{way['processor_ms_per_mask']:.2f}")
        table.add_row(names[key], f"{way['step_ms']:.0f}", f"{way['mask_positions']:,}", *times, *sizes)
    table.caption = (
        f"{kept['speedup_ms_per_mask']:.2f} times as fast by the mask, "
        f"{kept['speedup_processor_ms_per_mask']:.2f} in processor time"
    )
    return table
