"""The tasks of lm-evaluation-harness for a diffusion model and its parent, offline where the data are local.

hildanext eval --model my-checkpoint --harness gsm8k --harness-data data/gsm8k --limit 100
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from rich.console import Console
from rich.table import Table

from hildanext.core.config import config, plain
from hildanext.core.console import wide_console
from hildanext.core.errors import ConfigError, DataError
from hildanext.core.metrics_log import to_json
from hildanext.core.run_dir import expand_home, write_atomically
from hildanext.core.runtime import machine
from hildanext.decoding import MODES, make_decoder
from hildanext.eval.lm_harness import adapter_class, subjects, together
from hildanext.eval.models import ModelPair

HARNESS = "harness.json"
SPLITS = ("train", "validation", "dev", "test")
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
TROUBLES = (OSError, ValueError, KeyError, RuntimeError)
"""What the harness raises for a task that it does not know or data that it cannot load."""


@config
class HarnessConfig:
    """Which of the harness's tasks are run, and how."""

    tasks: tuple[str, ...]
    data: str | None = None
    """A folder with a file per split (train.jsonl, test.jsonl; also .json, .csv, .parquet), or a folder per task."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """None is the task's own number."""
    limit: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)
    max_gen_toks: int = Field(default=256, ge=1)
    """Where the task says nothing."""
    decoder: dict[str, Any] = Field(default_factory=lambda: dict(MODES["S_MODE"]))
    block_size: int | None = Field(default=None, ge=1)
    """Of likelihoods: exact at 1, a bound elsewhere; None is the checkpoint's own."""
    draws: int = Field(default=16, ge=2)
    chat: bool = False
    bootstrap: int = Field(default=1000, ge=0)
    """Resamples behind standard errors that have no formula."""

    def __post_init__(self) -> None:
        make_decoder(self.decoder)


def run_harness(pair: ModelPair, settings: HarnessConfig, out: str | Path) -> dict[str, Any]:
    """Run the harness's tasks for the parent and the diffusion model; writes `harness.json` and every sample.

    Of several processes (started by torch's launcher) each answers its share, and the first one returns the numbers.
    Raises `ConfigError` without lm-eval or for an unknown task, `DataError` for data that cannot be had.
    """
    kind = adapter_class()
    import lm_eval

    _join_processes(pair)
    rows: list[dict[str, Any]] = []
    models = subjects(pair, settings.decoder, settings.block_size, settings.draws)
    adapter = None
    for name, (writer, scorer) in models.items():
        adapter = kind(writer=writer, scorer=scorer, batch_size=settings.batch_size, max_gen_toks=settings.max_gen_toks)
        evaluated = lm_eval.simple_evaluate(
            model=adapter,
            tasks=load_tasks(settings.tasks, settings.data),
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            bootstrap_iters=settings.bootstrap,
            apply_chat_template=settings.chat,
            log_samples=True,
        )
        if evaluated is None:
            continue
        rows += _rows(name, evaluated)
        for task, samples in evaluated["samples"].items():
            lines = "".join(to_json(sample) + "\n" for sample in samples)
            write_atomically(Path(out) / "harness" / f"{task}--{name}.jsonl", lines)
    methods = {
        name: {"writes": writer.settings, "scores": scorer.settings} for name, (writer, scorer) in models.items()
    }
    network = next(iter(models.values()))[0].network
    result = {
        "lm_eval": lm_eval.__version__,
        "settings": plain(settings),
        "ways": methods,
        "machine": machine(network.device, network.dtype),
        "processes": adapter.world_size if adapter is not None else 1,
        "results": rows,
    }
    if rows:
        write_atomically(Path(out) / HARNESS, to_json(result, indent=2) + "\n")
    return result


def load_tasks(names: Sequence[str], data: str | None) -> list[Any]:
    """The harness's task objects, reading local files where `data` names a folder."""
    from lm_eval.tasks import TaskManager

    manager, tasks = TaskManager(), []
    for name in names:
        spec: Any = name
        if data is not None:
            # A group of one: the harness merges what follows into the task's own file.
            spec = {"group": f"hilda_{name}", "task": [{"task": name, **local_files(Path(data), name)}]}
            if name not in manager.all_tasks:
                raise ConfigError(f"lm-evaluation-harness has no task {name!r}", "lm-eval ls tasks lists them")
        try:
            tasks += manager.load([spec])["tasks"].values()
        except TROUBLES as problem:
            reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:300]
            raise DataError(
                f"lm-evaluation-harness cannot load {name!r} ({reason})",
                "check the task's name; without a hub give --harness-data FOLDER with a file per split",
            ) from None
    return tasks


def local_files(folder: Path, task: str) -> dict[str, Any]:
    """What makes a task read the files of a folder, or of the folder of its name in it. Raises `DataError`."""
    folder = expand_home(folder)
    folder = folder / task if (folder / task).is_dir() else folder
    files: dict[str, str] = {}
    builders: set[str] = set()
    for split in SPLITS:
        for suffix, builder in BUILDERS.items():
            for path in (folder / f"{split}{suffix}", folder / f"{split}{suffix}.gz"):
                if path.is_file() and split not in files:
                    files[split] = str(path.resolve())
                    builders.add(builder)
    if len(builders) != 1:
        what = "files of several kinds" if builders else "no file of a split"
        raise DataError(f"{str(folder)!r} holds {what}", "put test.jsonl (and train.jsonl for worked examples) there")
    return {"dataset_path": builders.pop(), "dataset_name": None, "dataset_kwargs": {"data_files": files}}


def _join_processes(pair: ModelPair) -> None:
    """Under torch's launcher the processes meet here; alone there is nothing to do."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not together():
        side = pair.model if pair.model is not None else pair.parent
        assert side is not None
        torch.distributed.init_process_group("nccl" if side.device.type == "cuda" else "gloo")


def _rows(subject: str, evaluated: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for task, scores in evaluated["results"].items():
        for key, value in scores.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = scores.get(f"{metric}_stderr,{kind}")
            items = evaluated.get("n-samples", {}).get(task, {}).get("effective")
            row = {"task": task, "subject": subject, "metric": metric, "filter": kind, "value": float(value)}
            rows.append(row | {"stderr": error if isinstance(error, float) else None, "items": items})
    return rows


def print_harness(result: Mapping[str, Any], console: Console | None = None) -> None:
    """One table of all tasks, the parent beside the diffusion model, and what was measured with."""
    if not result["results"]:
        return  # not the first process
    console = console if console is not None else wide_console()
    table = Table(title=f"lm-evaluation-harness {result['lm_eval']}", title_justify="left")
    for column in ("task", "metric", "filter", "", "value", "± stderr", "items"):
        table.add_column(column, justify="right" if column in ("value", "± stderr", "items") else "left")
    order = sorted(result["results"], key=lambda row: (row["task"], row["metric"], row["filter"]))
    for row in order:
        error = "" if row["stderr"] is None else f"{row['stderr']:.4f}"
        cells = [row["task"], row["metric"], row["filter"], row["subject"], f"{row['value']:.4f}", error]
        table.add_row(*cells, str(row["items"] or ""))
    console.print(table)
    for name, method in result["ways"].items():
        console.print(f"[dim]{name}: {json.dumps(method)}[/dim]", highlight=False)
    machine_facts = result["machine"]
    device = machine_facts["device_name"] or machine_facts["device"]
    ran_on = f"{device}, {machine_facts['dtype']}, {machine_facts['threads']} threads"
    console.print(f"[dim]{ran_on}, {result['processes']} process(es)[/dim]", highlight=False)
