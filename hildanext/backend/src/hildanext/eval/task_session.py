"""From a section to results: loads who takes part, runs the tasks, writes table, JSON and pictures.

The section `quality` of an evaluation, and `--tasks` of the verb, come here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hildanext.ar import Parent
from hildanext.core.config import plain
from hildanext.core.errors import ConfigError
from hildanext.eval import summary
from hildanext.eval.evaluation import load_baseline, wide_console
from hildanext.eval.models import ModelPair
from hildanext.eval.runner import QualityConfig, as_taught, run_tasks
from hildanext.models.loading.load import load_diffusion, load_parent

SAMPLES = "samples"
WIDTH = 160


def load_contestants(
    model: str | None, parent: str | None, dtype: torch.dtype, device: torch.device
) -> tuple[ModelPair, dict[str, Any]]:
    """The models that are named ("" or None: none), and what the results say about them.

    `parent` None is the one that the model's card names. Raises `ConfigError` where nobody takes part.
    """
    if not model:
        if not parent:
            raise ConfigError("neither a model nor a parent takes part", "give --model, --parent or both")
        causal_lm, tokenizer = load_parent(parent, dtype, device)
        return ModelPair(None, tokenizer, Parent(causal_lm, tokenizer)), {
            "model": None,
            "parent": parent,
            "card": None,
        }
    diffusion, tokenizer = load_diffusion(model, dtype, device)
    name = parent if parent is not None else diffusion.card.parent
    baseline = load_baseline(name, diffusion) if name else None
    told = {"model": model, "parent": name or None, "card": plain(diffusion.card)}
    return ModelPair(diffusion, tokenizer, baseline), told


def run_session(
    contestants: ModelPair,
    told: Mapping[str, Any],
    settings: QualityConfig,
    out: str | Path,
    samples: str | Path | None = None,
    quiet: bool = False,
) -> tuple[dict[str, Any], dict[str, Path]]:
    """Run every task; returns the results and the files they were written to. Samples lie in `out/samples`."""
    folder = Path(samples) if samples is not None else Path(out) / SAMPLES
    settings = as_taught(settings, contestants)
    runs = run_tasks(contestants, settings, folder, quiet)
    result = {**told, "settings": plain(settings), "samples": str(folder), **summary.summarise(runs)}
    return result, summary.save(result, out)


def print_tasks(result: Mapping[str, Any], console: Console | None = None) -> None:
    """The table, what each score was measured with, and a warning where a mask token was emitted."""
    console = console if console is not None else wide_console(WIDTH)
    console.print(summary.table(result))
    for line in summary.lines(result):
        console.print(f"[dim]{line}[/dim]", highlight=False)
    count = summary.mask_tokens(result)
    if count:
        console.print(f"[bold red]{count} mask tokens were emitted: this is a defect[/bold red]")
