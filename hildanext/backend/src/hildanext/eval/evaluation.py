"""A checkpoint beside its parent: likelihoods, quality and speed, as tables, JSON and pictures."""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from hildanext.ar import Parent
from hildanext.core import plots
from hildanext.core.config import RowLength, config, plain
from hildanext.core.console import machine_line, wide_console
from hildanext.core.errors import ConfigError, DataError
from hildanext.core.metrics_log import to_json
from hildanext.core.progress import time_left
from hildanext.core.run_dir import write_atomically
from hildanext.core.runtime import machine
from hildanext.data.batch import Batch
from hildanext.datasets import PackedDataset
from hildanext.detokenization import Detokenizer
from hildanext.eval.generation import PARENT, GenerationBenchConfig, compare, held_out_prompts, label
from hildanext.likelihood.held_out import LikelihoodConfig, TextLikelihood, bound, parent_likelihood
from hildanext.models import DiffusionModel

EVALUATION = "eval.json"
NOTES = (
    "exact: -log p of each token given those before it. bound: an upper bound, averaged over the orders in which "
    "a block's tokens may be revealed; ± is the standard error from the random masks. Where a bound stands beside an "
    "exact number, the bound's slack is part of the difference.",
    "All numbers are about the same tokens. The EOS padding that fills a document's last block is in a bound's sum and "
    "not in the count; 'no padding' leaves its loss out, as exact numbers do.",
    "Generative perplexity is under the parent and flatters repetition: read it with distinct-n. Forwards count all of "
    "them, tokens per forward leaves the prompt's prefill out. Ways took turns in one process.",
)

LIKELIHOOD_COLUMNS = ("", "kind", "nats/token", "perplexity", "no padding", "over parent")
GENERATION_COLUMNS = (
    "", "tokens/s", "tokens", "forwards", "tok/forward", "edits", "gen. ppl", "distinct-1/2/3", "repeats"
)  # fmt: skip

Say = Callable[[str], None]


@config
class EvalConfig:
    """What is evaluated, on what, how finely."""

    model: str
    """A diffusion checkpoint: a folder, or `tiny`."""
    data: str
    """A folder of prepared shards, held out from training."""
    parent: str | None = None
    """Default: the parent that the checkpoint's card names. "" evaluates without one."""
    sequence_length: RowLength = 256
    pad_to_block: int = Field(default=32, ge=1)
    rows: int = Field(default=16, ge=1)
    """Rows of the data, from the first one on."""
    batch_size: int = Field(default=4, ge=1)
    likelihood: LikelihoodConfig = LikelihoodConfig()
    generation: GenerationBenchConfig | None = GenerationBenchConfig()
    """None leaves the generation out."""

    def __post_init__(self) -> None:
        for size in self.likelihood.block_sizes:
            if size < 1 or self.sequence_length % size:
                raise ConfigError(
                    f"block size {size} does not divide the sequence length {self.sequence_length}",
                    "choose eval.likelihood.block_sizes that divide eval.sequence_length",
                )
            if self.pad_to_block % size and size % self.pad_to_block:
                raise ConfigError(
                    f"pad_to_block {self.pad_to_block} and the block size {size}: neither is a multiple of the other",
                    "choose eval.pad_to_block so that the blocks of eval.likelihood.block_sizes fit",
                )


def evaluate(
    model: DiffusionModel,
    tokenizer: PreTrainedTokenizerBase,
    parent: Parent | None,
    dataset: PackedDataset,
    settings: EvalConfig,
    say: Say | None = None,
) -> dict[str, Any]:
    """All numbers of an evaluation, as JSON types. Raises `DataError` where the data holds nothing to score."""
    tell = say if say is not None else _quiet
    batches = eval_batches(dataset, settings)
    begun = time.perf_counter()
    rows = _likelihoods(model, parent, batches, dataset.pad_id, settings.likelihood, tell)
    result: dict[str, Any] = {
        "model": settings.model,
        "parent": settings.parent,
        "card": plain(model.card),
        "settings": plain(settings),
        "machine": machine(model.device, model.dtype),
        "likelihood": rows,
        "likelihood_seconds": time.perf_counter() - begun,
        "notes": list(NOTES),
    }
    if settings.generation is not None:
        prompts = held_out_prompts(dataset, settings.generation.prompts, settings.generation.prompt_tokens)
        if not prompts:
            raise DataError(
                f"no document of {settings.generation.prompt_tokens} tokens begins in the data", "lower prompt_tokens"
            )

        begun = time.perf_counter()

        def each(done: int) -> None:
            left = (time.perf_counter() - begun) / done * (len(prompts) - done)
            tell(f"prompt {done} of {len(prompts)} decoded in every way{time_left(left)}")

        written = compare(model, tokenizer, parent, prompts, settings.generation, each)
        result["generation"] = [method.to_record() for method in written]
        result["prompts"] = [Detokenizer(tokenizer).text(prompt) for prompt in prompts]
    return result


def eval_batches(dataset: PackedDataset, settings: EvalConfig) -> list[Batch]:
    """The first rows of the data. Raises `DataError` where there are none."""
    rows = min(settings.rows, len(dataset))
    if rows == 0:
        raise DataError("the evaluation data has no rows", "prepare a held-out text first")
    return [
        dataset.batch(range(start, min(start + settings.batch_size, rows)))
        for start in range(0, rows, settings.batch_size)
    ]


def _likelihoods(
    model: DiffusionModel,
    parent: Parent | None,
    batches: list[Batch],
    pad_id: int,
    settings: LikelihoodConfig,
    tell: Say,
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    base, begun = math.nan, time.perf_counter()

    def add(name: str, scored: TextLikelihood) -> None:
        over = 100 * (scored.nats_per_token / base - 1) if base == base else None
        rows.append({"name": name, **scored.plain(), "percent_over_parent": over})
        tell(f"{name}: {scored.nats_per_token:.4f} nats per token")

    if parent is not None:
        baseline = parent_likelihood(parent, batches, pad_id)
        base = baseline.nats_per_token
        # A forward of noisy and clean copies is about two of the parent's; a bound takes one for each draw.
        forwards = sum(2 * (1 if size == 1 else settings.draws) for size in settings.block_sizes)
        left = time_left(forwards * (time.perf_counter() - begun))
        add(PARENT, baseline)
        if left:
            tell(f"the model's likelihoods:{left.removeprefix(',')}")
    for size in settings.block_sizes:
        add(f"diffusion, block {size}", bound(model, batches, size, pad_id, settings))
    if not rows or rows[0]["tokens"] == 0:
        raise DataError("the evaluation data has no token to predict", "prepare a longer held-out text")
    return rows


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The evaluation for a terminal."""
    count = result["likelihood"][0]["tokens"]
    likelihood = Table(title=f"Likelihood of {count:,} held-out tokens", title_justify="left")
    for column in LIKELIHOOD_COLUMNS:
        likelihood.add_column(column, justify="left" if column in ("", "kind") else "right", no_wrap=True)
    for row in result["likelihood"]:
        likelihood.add_row(*likelihood_cells(row))
    shown = [likelihood]
    if "generation" in result:
        speed = Table(title=f"Writing: {len(result['prompts'])} prompts, one at a time", title_justify="left")
        for column in GENERATION_COLUMNS:
            speed.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
        for row in result["generation"]:
            speed.add_row(*generation_cells(row))
        shown.append(speed)
    return shown


def likelihood_cells(row: Mapping[str, Any]) -> list[str]:
    spread = f" ± {row['se']:.3f}" if row["kind"] == "bound" and row["se"] == row["se"] else ""
    over = row.get("percent_over_parent")
    return [
        row["name"],
        row["kind"],
        f"{row['nats_per_token']:.3f}{spread}",
        f"{row['perplexity']:.2f}" if row["perplexity"] < 1e5 else f"{row['perplexity']:.2g}",
        f"{row['nats_without_padding']:.3f}",
        "" if over is None else f"{over:+.1f} %",
    ]


def generation_cells(row: Mapping[str, Any]) -> list[str]:
    perplexity = row["generative_perplexity"]
    return [
        label(row["name"]),
        f"{row['tokens_per_second']:.1f}",
        str(row["tokens"]),
        str(row["forwards"]),
        f"{row['tokens_per_forward']:.2f}",
        str(row["edits"]),
        "" if perplexity != perplexity else f"{perplexity:.1f}" if perplexity < 1e5 else f"{perplexity:.2g}",
        "/".join(f"{row[f'distinct_{n}']:.2f}" for n in (1, 2, 3)),
        f"{100 * row['repetition']:.0f} %",
    ]


def print_result(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Tables, notes and what it was measured on."""
    console = console if console is not None else wide_console()
    for table in tables(result):
        console.print(table)
    for note in result["notes"]:
        console.print(f"[dim]{note}[/dim]", highlight=False)
    console.print(f"[dim]{machine_line(result)}[/dim]", highlight=False)


def save_result(result: Mapping[str, Any], folder: str | Path) -> dict[str, Path]:
    """Write `eval.json` and the pictures; returns them by name."""
    folder = Path(folder)
    files = {"json": folder / EVALUATION}
    write_atomically(files["json"], to_json(result, indent=2) + "\n")
    bars = {row["name"]: row["nats_per_token"] for row in result["likelihood"]}
    errors = {row["name"]: row["se"] for row in result["likelihood"]}
    figure = plots.bars_figure(bars, "nats per token (lower is better)", "Held-out likelihood", errors)
    files["likelihood"] = plots.save(figure, folder / "likelihood.png")
    if "generation" in result:
        speeds = {label(row["name"]): row["tokens_per_second"] for row in result["generation"]}
        figure = plots.bars_figure(speeds, "tokens per second", "Writing speed")
        files["speed"] = plots.save(figure, folder / "speed.png")
        quality = {label(row["name"]): row["generative_perplexity"] for row in result["generation"]}
        if all(value == value for value in quality.values()):
            title = "Generative perplexity (read it with distinct-n)"
            figure = plots.bars_figure(quality, "perplexity under the parent", title)
            files["quality"] = plots.save(figure, folder / "quality.png")
    return files


def _quiet(_: str) -> None:
    return None
