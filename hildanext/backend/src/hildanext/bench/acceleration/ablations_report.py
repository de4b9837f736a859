"""What `ablations` measured, for people: a table for each list, the same as Markdown, and a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from hildanext.bench.acceleration.frontier_report import CAPTION, COLUMNS, points, row_cells
from hildanext.bench.rl.sheets import Sheet, document
from hildanext.core import plots


def tables(result: Mapping[str, Any]) -> list[Table]:
    return [sheet.table() for sheet in _sheets(result)]


def markdown(result: Mapping[str, Any]) -> str:
    return document(_sheets(result), result["machine"], f"Model: `{result['model']}`.")


def draw(result: Mapping[str, Any], path: str | Path) -> Path:
    """A row of two pictures for each table: nats against tokens per forward and against tokens per second."""
    every = list(result["tables"].values())
    figure, grid = plots.new_grid(len(every), 2, 13.0, 4.2 * len(every))
    for table, (left, right) in zip(every, grid, strict=True):
        rows = [row for row in table["rows"] if "missing" not in row]
        points(left, rows, lambda row: row["tokens_per_forward"]["value"], "tokens per forward")
        points(right, rows, lambda row: row["tokens_per_second"], "tokens per second")
        left.set_title(table["title"], fontsize=9, loc="left")
        left.legend(fontsize=6, ncols=2)
    return plots.save(figure, path)


def _sheets(result: Mapping[str, Any]) -> list[Sheet]:
    sheets = []
    size = f"{len(result['prompt_tokens'])} prompts x {result['settings']['new_tokens']} tokens"
    for table in result["tables"].values():
        named = {row["name"]: row for row in table["rows"]}
        base = named[table["base"]] if "missing" not in named[table["base"]] else None
        rows = [
            [row["name"], f"not there: {row['missing']}", *[""] * (len(COLUMNS) - 2)]
            if "missing" in row
            else row_cells(row, base)
            for row in table["rows"]
        ]
        sheets.append(Sheet(f"{table['title']}: {size}", COLUMNS, rows, CAPTION.format(base=table["base"])))
    return sheets + [_task(task) for task in result["tasks"] or ()]


def _task(task: Mapping[str, Any]) -> Sheet:
    """Every metric of a task, as `eval` counts it."""
    names = list(dict.fromkeys(name for way in task["ways"] for name in way["scores"]))
    rows = [[way["name"], *(_score(way["scores"].get(name)) for name in names)] for way in task["ways"]]
    return Sheet(f"Task {task['key']}", ("way", *names), rows, "Means with 95 % intervals over items")


def _score(metric: Mapping[str, Any] | None) -> str:
    if metric is None or metric["value"] is None:
        return "-"
    return f"{metric['value']:.3f} ({metric['low']:.3f}, {metric['high']:.3f})"
