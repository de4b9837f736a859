"""The verbs of the command line, a file each. `configure(parser)` imports no torch, `run(options)` gives the exit code.

A verb reads its flags, calls the front door of its stage and prints. It computes nothing itself.
To add one: write the file, add its row in `cli.py`, add its test.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hildanext.core.errors import ConfigError


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The flags every verb that reads a run has: --config FILE and --set section.field=value."""
    parser.add_argument("--config", metavar="FILE", help="a run: a JSON object of sections")
    parser.add_argument(
        "--set",
        dest="assignments",
        metavar="SECTION.FIELD=VALUE",
        action="append",
        default=[],
        help="override one value of the run; may be given several times",
    )


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of verbs that take a whole recipe."""
    parser.add_argument("recipe", nargs="?", metavar="FILE", help="a run: a JSON object with stages")
    add_run_flags(parser)


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of verbs that train in a folder of their own."""
    add_run_flags(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="run folder; an unfinished run in it is resumed")
    parser.add_argument("--quiet", action="store_true", help="no progress display")


def report_training(
    options: argparse.Namespace, run: Mapping[str, Any], outcome: Mapping[str, Any], summary: Mapping[str, Any]
) -> int:
    """Write the page of a verb that trained and print its summary, in the main process; the exit code."""
    from hildanext.core.runtime import is_main_process
    from hildanext.report.html import write_report

    if is_main_process():
        report = write_report(options.out, {options.verb: outcome}, run.get("name", "") or Path(options.out).name)
        print(json.dumps({**summary, "report": str(report)}))
    return 0


def load_run(options: argparse.Namespace, defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The run of --config over `defaults` (merged section by section), with every --set applied.

    A section that names another family member (`{"name": ...}`) replaces the default one whole. The rest of the verb
    is under the run's profile.
    Raises `ConfigError` where the file cannot be read.
    """
    from hildanext.core.config import merge, override, read_json
    from hildanext.core.registry import choose_profile

    run: dict[str, Any] = {} if defaults is None else dict(defaults)
    if getattr(options, "config", None):
        run = merge(run, read_json(options.config))
    run = override(run, getattr(options, "assignments", None) or [])
    choose_profile(run)  # of the whole verb: what it builds later is built under it
    return run


def read_recipe(options: argparse.Namespace) -> dict[str, Any]:
    """The run that the flags name. Raises `ConfigError` where none is named."""
    if options.recipe is not None:
        options.config = options.recipe
    if options.config is None:
        raise ConfigError("no run was named", f"hildanext {options.verb} hildanext/runs/configs/demo.json")
    return load_run(options)
