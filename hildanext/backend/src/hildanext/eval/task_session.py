"""From a section to results: loads who takes part, runs the tasks, writes table, JSON and pictures.

The section `quality` of an evaluation, and `--tasks` of the verb, come here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from hildanext.ar import Parent
from hildanext.core.config import plain
from hildanext.core.console import wide_console
from hildanext.core.errors import ConfigError
from hildanext.core.runtime import RuntimeConfig
from hildanext.eval import summary, task_tables
from hildanext.eval.models import ModelPair
from hildanext.eval.runner import QualityConfig, as_taught, run_tasks
from hildanext.models.loading.load import load_parent
from hildanext.models.loading.loaded_model import LoadedModel

SAMPLES = "samples"


def open_pair(model: str | None, parent: str | None, runtime: RuntimeConfig) -> tuple[ModelPair, dict[str, Any]]:
    """The models that are named ("" or None: none), and what the results say about them.

    `parent` None is the one that the model's card names. Raises `ConfigError` where nobody takes part.
    """
    if model:
        opened = LoadedModel.open(model, runtime)
        name = parent if parent is not None else opened.parent_name
        pair = ModelPair(opened.model, opened.tokenizer, Parent(*opened.parent(name)) if name else None)
        return pair, {"model": model, "parent": name or None, "card": plain(opened.card)}
    if not parent:
        raise ConfigError("neither a model nor a parent takes part", "give --model, --parent or both")
    chosen = runtime.resolve()
    causal_lm, tokenizer = load_parent(parent, chosen.dtype, chosen.device)
    pair = ModelPair(None, tokenizer, Parent(causal_lm, tokenizer))
    return pair, {"model": None, "parent": parent, "card": None}


def run_session(
    pair: ModelPair,
    who: Mapping[str, Any],
    settings: QualityConfig,
    out: str | Path,
    samples: str | Path | None = None,
    quiet: bool = False,
) -> tuple[dict[str, Any], dict[str, Path]]:
    """Run every task; returns the results and the files they were written to. Samples lie in `out/samples`."""
    folder = Path(samples) if samples is not None else Path(out) / SAMPLES
    settings = as_taught(settings, pair)
    runs = run_tasks(pair, settings, folder, quiet)
    result = {**who, "settings": plain(settings), "samples": str(folder), **summary.summarise(runs)}
    return result, summary.save(result, out)


def print_tasks(result: Mapping[str, Any], console: Console | None = None) -> None:
    """The table, what each score was measured with, and a warning where a mask token was emitted."""
    console = console if console is not None else wide_console()
    console.print(task_tables.table(result))
    for line in task_tables.lines(result):
        console.print(f"[dim]{line}[/dim]", highlight=False)
    count = summary.mask_tokens(result)
    if count:
        console.print(f"[bold red]{count} mask tokens were emitted: this is a defect[/bold red]")
