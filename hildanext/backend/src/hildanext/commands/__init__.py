"""The verbs of the command line, a file each. `configure(parser)` imports no torch, `run(options)` gives the exit code.

A verb reads its flags, calls the front door of its stage and prints. It computes nothing itself.
To add one: write the file, add its row in `cli.py`, add its test.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hildanext.core.errors import ConfigError
from hildanext.core.metrics_log import to_json
from hildanext.stages import STAGES

if TYPE_CHECKING:
    from hildanext.recipe import Fold, StageContext


RUNTIME_FLAGS = ("device", "dtype", "threads", "runtime")
"""Flags that are keys of the run."""


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


def add_runtime_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of verbs that load a model: what it runs on."""
    parser.add_argument("--device", help="auto (default), cpu, cuda, ...")
    parser.add_argument("--dtype", help="auto (default), fp32, bf16, fp16 or fp64; of ONNX Runtime fp32, q8 or q4")
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--runtime", help="torch, or onnx (writing text, on the CPU); auto (default): onnx for q8 and q4"
    )


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of verbs that train in a folder of their own."""
    add_run_flags(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="run folder; an unfinished run in it is resumed")
    parser.add_argument("--quiet", action="store_true", help="no progress display")
    parser.add_argument("--json", action="store_true", help="end with one JSON object instead of text")


def open_stage(
    options: argparse.Namespace,
    fold: "Fold | None" = None,
    defaults: Mapping[str, Any] | None = None,
    stage: str | None = None,
) -> "tuple[dict[str, Any], StageContext]":
    """A stage, that of the verb's name by default, as the run and the flags have it; see `recipe.open_stage`."""
    from hildanext.recipe import open_stage as open_resolved

    run, out = load_run(options, defaults), getattr(options, "out", None) or ""
    stage = stage if stage is not None else str(options.verb)
    return open_resolved(run, stage, STAGES, fold, out, getattr(options, "quiet", False))


def run_training(options: argparse.Namespace, section: dict[str, Any], context: "StageContext") -> int:
    """Do a stage that trains, write its page and say what there is and what to try, in the main process; the exit
    code."""
    from hildanext.core.runtime import is_main_process
    from hildanext.recipe import run_stage
    from hildanext.report.html import write_report

    outcome = run_stage(section, context, STAGES)
    if is_main_process():
        report = write_report(options.out, {options.verb: outcome}, context.name or Path(options.out).name)
        if not outcome["whole"]:
            print(f"stopped by {options.verb}.train.stop_after: the same command without it goes on", file=sys.stderr)
        summary = outcome.get(
            options.verb, {key: value for key, value in outcome.items() if key not in ("model", "run")}
        )
        summary |= {"report": str(report)}
        if options.json:
            print_json(summary)
        else:
            print(f"{_result(options, summary)}, {summary['seconds']:.0f} s of steps; report: {report}")
            if "checkpoint" in summary:
                print(f"next: {_next_command(options.verb, summary['checkpoint'])}")
    return 0


def _result(options: argparse.Namespace, summary: Mapping[str, Any]) -> str:
    """Where the checkpoint lies, or that there is none yet, and after how much."""
    what = f"checkpoint: {summary['checkpoint']}" if "checkpoint" in summary else f"no checkpoint yet in {options.out}"
    return f"{what} after {summary['step']:,} steps, {summary['tokens']:,} tokens"


def _next_command(verb: str, checkpoint: str) -> str:
    """A command that shows what the new checkpoint writes."""
    ask = "--chat --prompt 'How are you?'" if verb == "sft" else "--prompt 'Once upon a time'"
    return f"hildanext generate --model {shlex.quote(checkpoint)} {ask}"


def print_json(value: Any) -> None:
    """A line for scripts; numbers that JSON does not know are null."""

    print(to_json(value))


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
    run |= {name: value for name in RUNTIME_FLAGS if (value := getattr(options, name, None)) is not None}
    choose_profile(run)  # of the whole verb: what it builds later is built under it
    return run


def read_recipe(options: argparse.Namespace) -> dict[str, Any]:
    """The run that the flags name. Raises `ConfigError` where none is named."""
    if options.recipe is not None:
        options.config = options.recipe
    if options.config is None:
        raise ConfigError("no run was named", f"hildanext {options.verb} hildanext/runs/configs/demo.json")
    return load_run(options)
