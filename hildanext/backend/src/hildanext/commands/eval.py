"""A checkpoint beside its parent: likelihoods, quality, speed and benchmark tasks, each in one table (text, JSON, PNG).

hildanext eval --model runs/demo/convert/checkpoint --data runs/demo/prepare/valid --out runs/demo/eval
hildanext eval --model my-checkpoint --tasks gsm8k=data/gsm8k,math500=math500.jsonl --limit 100 --mode S_MODE,Q_MODE
hildanext eval --model tiny --harness gsm8k --harness-data data/gsm8k --limit 8
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hildanext.commands import add_run_flags, load_run
from hildanext.core.errors import ConfigError

if TYPE_CHECKING:
    from hildanext.eval.evaluation import EvalConfig
    from hildanext.eval.models import ModelPair
    from hildanext.eval.runner import QualityConfig

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
    parser.add_argument("--dtype", help="fp32, bf16, fp64 or auto (default)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quiet", action="store_true", help="no progress lines")
    add_run_flags(parser)


def run(options: argparse.Namespace) -> int:
    from hildanext.core.config import validate
    from hildanext.eval.evaluation import EvalConfig
    from hildanext.recipe import StageContext
    from hildanext.stages.eval import open_pair

    section = _section(options)
    dtype = section.pop("dtype", "auto")
    text = options.text if options.text is not None else section.pop("text", None)
    quality = _quality(section.pop("quality", None), options)
    reads = text is not None or "data" in section
    if not reads and quality is None and options.harness is None:
        raise ConfigError("nothing to evaluate", "give --data FOLDER (prepared shards), --text FILE or --tasks NAMES")
    if reads and not section["model"]:
        raise ConfigError(
            "--data and --text are about a diffusion model", "name one with --model, or give --tasks alone"
        )
    with tempfile.TemporaryDirectory(prefix="hildanext-eval-") as scratch:
        if text is not None:
            section["data"] = _prepared(text, section["model"], scratch)
        settings = validate(EvalConfig, section, where="eval") if reads else None
        context = StageContext(Path(), "eval", device=options.device, dtype=dtype, threads=options.threads)
        pair, names = open_pair(section["model"], section.get("parent"), context)
        if settings is not None:
            _held_out(settings, pair, options)
    failed = quality is not None and _tasks(quality, pair, names, options)
    if options.harness is not None:
        _harness(pair, names, options)
    return 1 if failed else 0


def _section(options: argparse.Namespace) -> dict[str, Any]:
    """The run's `eval` section with the flags over it; "none" is no model."""
    section: dict[str, Any] = {"model": "tiny", **load_run(options).get("eval", {})}
    for name in ("model", "parent", "data", "rows", "dtype"):
        value = getattr(options, name)
        if value is not None:
            section[name] = value
    for name in ("model", "parent"):
        if section.get(name) == "none":
            section[name] = ""
    return section


def _quality(section: Mapping[str, Any] | None, options: argparse.Namespace) -> "QualityConfig | None":
    """The section with the flags over it; `--tasks` chooses among its tasks and adds to them."""
    from hildanext.core.config import validate
    from hildanext.decoding import decoder_section, mode_name
    from hildanext.eval.runner import QualityConfig

    knobs: dict[str, Any] = dict(section) if section is not None else {}
    known = dict(knobs.get("tasks", {}))
    if options.tasks is not None:
        chosen = [part.strip().partition("=") for part in options.tasks.split(",") if part.strip()]
        knobs["tasks"] = {
            name: {**known.get(name, {}), **({"data": place} if equals else {})} for name, equals, place in chosen
        }
    if options.allow_unsafe_execution:
        if "humaneval" not in knobs.get("tasks", {}):
            raise ConfigError("--allow-unsafe-execution without programs to run", "it goes with --tasks humaneval")
        knobs["tasks"]["humaneval"] = {**knobs["tasks"]["humaneval"], "allow_unsafe_execution": True}
    if options.mode is not None:
        modes = [mode_name(mode.strip()) for mode in options.mode.split(",")]
        knobs["decoders"] = {mode: decoder_section(mode) for mode in modes}
    for name in ("limit", "batch_size"):
        if getattr(options, name) is not None:
            knobs[name] = getattr(options, name)
    if "tasks" not in knobs:
        return None
    return validate(QualityConfig, knobs, where="eval.quality")


def _prepared(text: str, model: str, scratch: str) -> str:
    """A text file as shards in a scratch folder, cut by the checkpoint's own tokenizer."""
    from hildanext.core.config import validate
    from hildanext.datasets import PrepareConfig, prepare
    from hildanext.models.loading.names import locate_diffusion
    from hildanext.tokenization import load_tokenizer

    out = str(Path(scratch) / "shards")
    tokenizer = load_tokenizer(locate_diffusion(model))
    has_bos = tokenizer.bos_token is not None
    source = {"name": "tinystories", "path": text}
    prepare(validate(PrepareConfig, {"source": source, "out": out, "add_bos": has_bos}, where="eval"), tokenizer)
    return out


def _held_out(settings: "EvalConfig", pair: "ModelPair", options: argparse.Namespace) -> None:
    from hildanext.eval.evaluation import print_result
    from hildanext.stages.eval import held_out_numbers

    result, files = held_out_numbers(pair, settings, options.out, None if options.quiet else _tell)
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


def _harness(pair: "ModelPair", names: Mapping[str, Any], options: argparse.Namespace) -> None:
    from hildanext.core.config import validate
    from hildanext.decoding import decoder_section
    from hildanext.eval.lm_harness_run import HarnessConfig, print_harness, run_harness

    mode = (options.mode or "S_MODE").split(",")[0]
    section = {
        "tasks": [name.strip() for name in options.harness.split(",") if name.strip()],
        "data": options.harness_data,
        "limit": options.limit,
        "batch_size": options.batch_size if options.batch_size is not None else 8,
        "decoder": decoder_section(mode),
        **load_run(options).get("eval", {}).get("harness", {}),
    }
    result = run_harness(pair, validate(HarnessConfig, section, where="eval.harness"), _out(names, options))
    print_harness(result)


def _out(names: Mapping[str, Any], options: argparse.Namespace) -> str:
    name = Path(str(names["model"] or names["parent"])).name
    return str(options.out) if options.out is not None else str(Path("runs") / "eval" / name)


def _written(files: Mapping[str, Path]) -> None:
    _tell(f"written: {', '.join(str(file) for file in files.values())}")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
