"""A checkpoint beside its parent: likelihoods, quality and speed in one table (text, JSON, PNG).

hildanext eval --model runs/demo/convert/checkpoint --data runs/demo/valid --out runs/demo/eval
hildanext eval --model tiny --text valid.txt --set eval.likelihood.draws=8 --set 'eval.likelihood.block_sizes=[1,8,32]'
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hildanext.errors import ConfigError
from hildanext.verbs import add_run_flags, load_run

if TYPE_CHECKING:
    from hildanext.bench.evaluation import EvalKnobs

EPILOG = """commands to paste:
  hildanext eval --model runs/demo/convert/checkpoint --data runs/demo/valid --out runs/demo/eval
  hildanext eval --model tiny --text valid.txt --rows 8
  hildanext eval --model my-checkpoint --data data/valid --set eval.likelihood.draws=16
  hildanext eval --model my-checkpoint --data data/valid --set eval.generation=null      (likelihoods only)

The section 'eval' of a run (--config) holds the same; docs/evaluation.md says what the numbers mean."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("--model", metavar="FOLDER", help="a diffusion checkpoint (default tiny)")
    parser.add_argument("--parent", metavar="MODEL", help="the autoregressive parent (default: the one the card names)")
    parser.add_argument("--data", metavar="FOLDER", help="prepared shards, held out from training")
    parser.add_argument("--text", metavar="FILE", help="a text file instead (stories parted by <|endoftext|> lines)")
    parser.add_argument("--rows", type=int, metavar="N", help="rows of the data that are used (default 16)")
    parser.add_argument("--out", metavar="FOLDER", help="where eval.json and the pictures go (default: nowhere)")
    parser.add_argument("--dtype", help="fp32, bf16, fp64 or auto (default)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quiet", action="store_true", help="no progress lines")
    add_run_flags(parser)


def run(options: argparse.Namespace) -> int:
    section = _section(options)
    dtype = section.pop("dtype", "auto")
    text = options.text if options.text is not None else section.pop("text", None)
    with tempfile.TemporaryDirectory(prefix="hildanext-eval-") as scratch:
        if text is not None:
            section["data"] = _prepared(text, section["model"], scratch)
        settings = _settings(section)
        result = _evaluate(settings, options, dtype)
    from hildanext.bench.evaluation import print_result

    print_result(result)
    return 0


def _section(options: argparse.Namespace) -> dict[str, Any]:
    """The run's `eval` section with the flags over it."""
    section: dict[str, Any] = {"model": "tiny", **load_run(options).get("eval", {})}
    for name in ("model", "parent", "data", "rows", "dtype"):
        value = getattr(options, name)
        if value is not None:
            section[name] = value
    if "data" not in section and "text" not in section and options.text is None:
        raise ConfigError("no evaluation data", "give --data FOLDER (prepared shards) or --text FILE")
    return section


def _settings(section: Mapping[str, Any]) -> "EvalKnobs":
    from hildanext.bench.evaluation import EvalKnobs
    from hildanext.config import build

    return build(EvalKnobs, section, where="eval")


def _prepared(text: str, model: str, scratch: str) -> str:
    """A text file as shards in a scratch folder, cut by the checkpoint's own tokenizer."""
    from hildanext.config import build
    from hildanext.datasets import PrepareKnobs, prepare
    from hildanext.models.names import locate_diffusion
    from hildanext.tokenization import load_tokenizer

    out = str(Path(scratch) / "shards")
    tokenizer = load_tokenizer(locate_diffusion(model))
    has_bos = tokenizer.bos_token is not None
    source = {"name": "tinystories", "path": text}
    prepare(build(PrepareKnobs, {"source": source, "out": out, "add_bos": has_bos}, where="eval"), tokenizer)
    return out


def _evaluate(settings: "EvalKnobs", options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    from hildanext.bench.evaluation import evaluate, load_baseline, save_result
    from hildanext.datasets import PackedDataset
    from hildanext.models.load import load_diffusion
    from hildanext.runtime import choose_device, choose_dtype, set_threads

    set_threads(options.threads)
    device = choose_device(options.device)
    model, tokenizer = load_diffusion(settings.model, choose_dtype(dtype, device), device)
    name = settings.parent if settings.parent is not None else model.card.parent
    parent = load_baseline(name, model) if name else None
    dataset = PackedDataset(settings.data, settings.sequence_length, "documents", settings.pad_to_block)
    result = evaluate(model, tokenizer, parent, dataset, settings, None if options.quiet else _tell)
    if options.out is not None:
        files = save_result(result, options.out)
        _tell(f"written: {', '.join(str(file) for file in files.values())}")
    return result


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
