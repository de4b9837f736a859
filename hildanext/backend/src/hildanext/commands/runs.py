"""List run folders, and compare some of them.

hildanext runs
hildanext runs build/demo runs
hildanext runs --compare runs/first runs/second --plot comparison.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hildanext.commands import print_json
from hildanext.core.errors import ConfigError

if TYPE_CHECKING:
    from hildanext.report.compare_runs import RunSummary

PLACE = "runs"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("places", nargs="*", default=[PLACE], metavar="FOLDER", help=f"where to look (default {PLACE})")
    parser.add_argument("--compare", action="store_true", help="the runs side by side: settings that differ, results")
    parser.add_argument("--plot", metavar="FILE", help="with --compare, draw what was held out into this PNG")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")


def run(options: argparse.Namespace) -> int:
    from hildanext.report.compare_runs import differences, draw_comparison, find_runs

    if options.plot and not options.compare:
        raise ConfigError("--plot draws a comparison", "add --compare")
    runs = find_runs(options.places)
    if options.compare and len(runs) < 2:
        raise ConfigError("one run cannot be compared", "name at least two run folders")
    different = differences(runs) if options.compare else {}
    if options.json:
        print_json({"runs": [run.as_json() for run in runs], "differences": different})
    elif options.compare:
        _print_comparison(runs, different)
    else:
        _print_list(runs)
    if options.plot:
        draw_comparison(runs, Path(options.plot))
        if not options.json:
            print(f"drawn: {options.plot}")
    return 0


def _print_list(runs: "Sequence[RunSummary]") -> None:
    from rich.table import Table
    from rich.text import Text

    from hildanext.core.console import wide_console

    numbers: tuple[str, ...] = ("step", "tokens", "loss", "bound", "reward", "accuracy")
    aligned = any(run.kind == "rl" for run in runs)
    numbers = numbers if aligned else numbers[:4]
    table = Table("run", "kind", "profile", "changed (UTC)", *numbers, "checkpoint", box=None)
    for run in runs:
        end = "yes" if run.checkpoint else ""
        table.add_row(Text(str(run.folder)), run.kind, run.profile, run.changed, *_numbers(run)[: len(numbers)], end)
    wide_console().print(table)


def _print_comparison(runs: "Sequence[RunSummary]", different: dict[str, list[Any]]) -> None:
    from rich.table import Table

    from hildanext.core.console import wide_console
    from hildanext.report.compare_runs import short_names

    table = Table("", *short_names(runs))
    for key, values in different.items():
        table.add_row(key, *(_cell(value) for value in values))
    table.add_section()
    ends = [_numbers(run) for run in runs]
    for index, name in enumerate(("step", "tokens", "loss", "held-out bound", "reward (last rounds)")):
        table.add_row(name, *(end[index] for end in ends))
    measured = sorted({name for run in runs for name in run.held_out} - {"bound", "block_size"})
    for name in measured:
        table.add_row(f"held out: {name}", *(_cell(run.held_out.get(name)) for run in runs))
    wide_console().print(table)


def _numbers(run: "RunSummary") -> list[str]:
    return [_cell(number) for number in (run.step, run.tokens, run.loss, run.bound, run.reward, run.accuracy)]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
