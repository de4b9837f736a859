"""A checkpoint beside its parent: likelihoods, quality, speed and benchmark tasks, each in one table (text, JSON, PNG).

hildanext eval --model runs/demo/convert/checkpoint --data runs/demo/prepare/valid --out runs/demo/eval
hildanext eval --model my-checkpoint --tasks gsm8k=data/gsm8k,math500=math500.jsonl --limit 100 --mode S_MODE,Q_MODE
hildanext eval --model tiny --harness gsm8k --harness-data data/gsm8k --limit 8
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hildanext.commands import add_run_flags, add_runtime_flags, open_stage
from hildanext.core.errors import ConfigError

if TYPE_CHECKING:
    from hildanext.eval.models import ModelPair
    from hildanext.eval.runner import QualityConfig
    from hildanext.stages.eval import Evaluation

EPILOG = """commands to paste:
  hildanext eval --model runs/demo/convert/checkpoint --data runs/demo/prepare/valid --out runs/demo/eval
  hildanext eval --model tiny --text valid.txt --rows 8
  hildanext eval --model my-checkpoint --data data/valid --set eval.generation=null      (likelihoods only)
  hildanext eval --model my-checkpoint --tasks gsm8k,math500 --limit 100                 (data of the hub)
  hildanext eval --model my-checkpoint --tasks gsm8k=data/gsm8k --set eval.quality.tasks.gsm8k.few_shot=0
  hildanext eval --model none --parent smollm2-135m --tasks gsm8k=data/gsm8k             (the parent alone)
  hildanext eval --model my-checkpoint --harness gsm8k --harness-data data/gsm8k         (lm-evaluation-harness)

The section 'eval' of a run (--config) holds the same; docs/evaluation.md says what the numbers mean."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("--model", metavar="FOLDER", help="a diffusion checkpoint (default tiny), or none")
    parser.add_argument("--parent", metavar="MODEL", help="its parent (default: the one the card names), or none")
    parser.add_argument("--data", metavar="FOLDER", help="prepared shards, held out from training")
    parser.add_argument("--text", metavar="FILE", help="a text file instead (stories parted by <|endoftext|> lines)")
    parser.add_argument("--rows", type=int, metavar="N", help="rows of the data that are used (default 16)")
    parser.add_argument(
        "--tasks",
        metavar="NAME[=DATA],...",
        help="benchmarks, each with a file, a folder or a hub id (default: the hub)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="items of each task (default: all)")
    parser.add_argument("--mode", metavar="MODE,...", help="how the diffusion model writes (default S_MODE)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="items that are decoded together (default 8)")
    parser.add_argument("--samples-out", metavar="FOLDER", help="where samples go (default: OUT/samples)")
    parser.add_argument(
        "--allow-unsafe-execution",
        action="store_true",
        help="humaneval: run programs even where they cannot be isolated",
    )
    parser.add_argument("--harness", metavar="NAME,...", help="tasks of lm-evaluation-harness (extra 'eval')")
    parser.add_argument("--harness-data", metavar="FOLDER", help="local data for them: a file per split")
    parser.add_argument(
        "--out", metavar="FOLDER", help="where JSON and pictures go (tasks: runs/eval/MODEL; else nowhere)"
    )
    add_runtime_flags(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress lines")
    add_run_flags(parser)


def run(options: argparse.Namespace) -> int:
    from hildanext.stages.eval import resolve

    asked = resolve(*open_stage(options, lambda section: _folded(section, options), {"eval": {"model": "tiny"}}))
    pair, names = asked.open()
    if asked.held_out is not None:
        _held_out(asked, pair, options)
    failed = asked.quality is not None and _tasks(asked.quality, pair, names, options)
    if asked.harness is not None:
        from hildanext.eval.lm_harness_run import print_harness, run_harness

        print_harness(run_harness(pair, asked.harness, _out(names, options)))
    return 1 if failed else 0


def _folded(section: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The section `eval` with the flags in it; "none" is no model."""
    from hildanext.recipe import section_of

    flags = {name: getattr(options, name) for name in ("model", "parent", "data", "text", "rows")}
    folded = {**section, **{name: value for name, value in flags.items() if value is not None}}
    folded |= {name: "" for name in ("model", "parent") if folded.get(name) == "none"}
    counts = {name: getattr(options, name) for name in ("limit", "batch_size") if getattr(options, name) is not None}
    if options.harness is not None:
        folded["harness"] = _harness(options, counts) | dict(section_of(section, "harness"))
    quality = _quality(dict(section_of(section, "quality")), options, counts)
    if quality.get("tasks"):
        folded["quality"] = quality
    elif "harness" not in folded and (counts or options.mode is not None):
        flag = "mode" if options.mode is not None else next(iter(counts)).replace("_", "-")
        raise ConfigError(f"--{flag} is about benchmark tasks, and none are named", "add --tasks or --harness")
    if options.dtype is not None:
        folded["dtype"] = options.dtype
    return folded


def _quality(knobs: dict[str, Any], options: argparse.Namespace, counts: Mapping[str, int]) -> dict[str, Any]:
    """The section `quality` with the flags in it; `--tasks` chooses among its tasks and adds to them."""
    from hildanext.decoding import decoder_section, mode_name
    from hildanext.recipe import section_of

    known = section_of(knobs, "tasks")
    if options.tasks is not None:
        chosen = [part.strip().partition("=") for part in options.tasks.split(",") if part.strip()]
        knobs["tasks"] = {
            name: {**section_of(known, name), **({"data": place} if equals else {})} for name, equals, place in chosen
        }
    if options.allow_unsafe_execution:
        if "humaneval" not in section_of(knobs, "tasks"):
            raise ConfigError("--allow-unsafe-execution without programs to run", "it goes with --tasks humaneval")
        knobs["tasks"]["humaneval"] = {**section_of(knobs["tasks"], "humaneval"), "allow_unsafe_execution": True}
    if options.mode is not None:
        modes = [mode_name(mode.strip()) for mode in options.mode.split(",")]
        fast = _fast_section(modes, options)
        knobs["decoders"] = {mode: decoder_section(mode, None, None, fast) for mode in modes}
    return {**knobs, **counts}


def _harness(options: argparse.Namespace, counts: Mapping[str, int]) -> dict[str, Any]:
    """What the flags say of lm-evaluation-harness, under the section `harness`."""
    from hildanext.decoding import decoder_section

    tasks = [name.strip() for name in options.harness.split(",") if name.strip()]
    mode = (options.mode or "S_MODE").split(",")[0]
    decoder = decoder_section(mode, None, None, _fast_section([mode], options))
    return {"tasks": tasks, "data": options.harness_data, "decoder": decoder, **counts}


def _fast_section(modes: list[str], options: argparse.Namespace) -> dict[str, Any] | None:
    """What the card of the named model says of mode `fast`, where that is asked for."""
    from hildanext.decoding import FAST
    from hildanext.facade import fast_of

    return fast_of(options.model) if FAST in modes and options.model is not None else None


def _held_out(asked: "Evaluation", pair: "ModelPair", options: argparse.Namespace) -> None:
    from hildanext.eval.evaluation import print_result

    result, files = asked.held_out_numbers(pair, options.out, None if options.quiet else _tell)
    if files:
        _written(files)
    print_result(result)


def _tasks(quality: "QualityConfig", pair: "ModelPair", names: Mapping[str, Any], options: argparse.Namespace) -> bool:
    """Run the tasks and print them; True where a mask token was emitted, which must not be."""
    from hildanext.eval.summary import mask_tokens
    from hildanext.eval.task_session import print_tasks, run_session

    out = _out(names, options)
    result, files = run_session(pair, names, quality, out, options.samples_out, options.quiet)
    print_tasks(result)
    _written({**files, "samples": Path(result["samples"])})
    return mask_tokens(result) > 0


def _out(names: Mapping[str, Any], options: argparse.Namespace) -> str:
    name = Path(str(names["model"] or names["parent"])).name
    return str(options.out) if options.out is not None else str(Path("runs") / "eval" / name)


def _written(files: Mapping[str, Path]) -> None:
    _tell(f"written: {', '.join(str(file) for file in files.values())}")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
