"""`hildanext prepare`: text to packed token shards; with --graphs, examples to examples with causal graphs.

hildanext prepare --source tinystories --path TinyStories-train.txt --tokenizer tiny --out data/tinystories
hildanext prepare --source dolma --path 'dolma/v1_6/*.json.gz' --tokenizer qwen3-0.6b --out data/dolma --shard 0/8
hildanext prepare --source huggingface --set prepare.source.dataset=roneneldan/TinyStories --out data/hub
hildanext prepare --graphs rule:gsm8k --path gsm8k/train.jsonl --out data/gsm8k
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hildanext.commands import add_run_flags, load_run, open_stage
from hildanext.core.errors import ConfigError
from hildanext.core.knobs import names_in
from hildanext.stages import STAGES

if TYPE_CHECKING:
    from hildanext.core.progress import InputShare
    from hildanext.datasets import OnProgress

DATA = Path(__file__).parents[1] / "data"

EPILOG = """commands to paste:
  hildanext prepare --source tinystories --path TinyStories-train.txt --tokenizer tiny --out data/tinystories
  hildanext prepare --source text --path books/ --tokenizer smollm2-135m --out data/books
  hildanext prepare --source jsonl --path posts.jsonl --set prepare.source.text_field=body --out data/posts
  hildanext prepare --source dolma --path 'dolma/v1_6/*.json.gz' --tokenizer qwen3-0.6b --out data/dolma --shard 0/8
  hildanext prepare --source huggingface --set prepare.source.dataset=roneneldan/TinyStories --out data/hub
  hildanext prepare --source parent --parent smollm2-135m --prompts questions.txt --chat --out data/answers
  hildanext prepare --graphs rule:gsm8k --path gsm8k/train.jsonl --out data/gsm8k
  hildanext prepare --graphs json:teacher --path taught.jsonl --set graphs.field=links --out data/taught.jsonl

The section 'prepare' of a run (--config) holds the same: source {"name": ..., knobs}, out, tokenizer, shard_tokens,
add_bos, add_eos, bos_token, eos_token, special_tokens_in_text. A prepare that was cut short, however it was, goes
on where it stopped when the same command is run again, and ends with the same bytes.

With --graphs the input is JSONL with prompt and response (or GSM8K's question and answer), and the output the same
examples as they are to be trained, each with its causal graph: what `hildanext sft` reads. The extractor's knobs are
the section 'graphs'. `hildanext explain-graph` draws one."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("--source", metavar="NAME", help=_names("sources", "SOURCES"))
    parser.add_argument("--path", action="append", help="a file, a folder or a pattern; may be given several times")
    parser.add_argument(
        "--prompts", metavar="FILE", help="with --source parent: what it is asked, one per line (or a .jsonl file)"
    )
    parser.add_argument("--parent", metavar="MODEL", help="with --source parent: who writes (default tiny)")
    parser.add_argument("--chat", action="store_true", help="with --prompts: a prompt is a question to the model")
    parser.add_argument("--out", metavar="FOLDER", help="where the shards go")
    parser.add_argument(
        "--tokenizer", metavar="MODEL", help="a model's name, folder, hub id or .gguf file (default tiny)"
    )
    parser.add_argument(
        "--graphs", metavar="NAME", help=f"extract causal graphs: {_names('causal_graphs', 'EXTRACTORS')}"
    )
    parser.add_argument("--shard", metavar="I/N", default="0/1", help="do part I of N, counted from 0 (default 0/1)")
    parser.add_argument("--quiet", action="store_true", help="no progress display")
    add_run_flags(parser)


def _names(family: str, table: str) -> str:
    """Read from the source: importing the table loads pydantic, three times what the rest of --help takes."""
    *most, last = names_in(DATA / family, table)
    return f"{', '.join(most)} or {last}"


def run(options: argparse.Namespace) -> int:
    if options.graphs is not None:
        return _graphs(options)
    from hildanext.stages.prepare import prepare_parts

    if options.parent:
        options.assignments = [*options.assignments, f"parent={json.dumps(options.parent)}"]
    shard = _shard(options.shard)
    section, context = open_stage(options, lambda section: _folded(section, options))
    if not options.out and "out" not in section:
        raise ConfigError("no output folder", "give --out FOLDER")
    started = time.perf_counter()
    with _display(options.quiet) as (progress, seen, share):
        for _, out, manifest in prepare_parts(section, context, shard, progress, share.reached):
            _print_part(out, manifest, seen["tokens"], time.perf_counter() - started)
            seen["tokens"], started = 0, time.perf_counter()
    return 0


def _print_part(out: str, manifest: dict[str, Any], tokens: int, seconds: float) -> None:
    """What there is, and how much of it was done now."""
    done = f"{tokens:,} tokens now, in {seconds:.1f} s ({tokens / seconds:,.0f} tokens/s)"
    print(f"{out}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens, ", end="")
    print(f"{len(manifest['shards'])} shards; {done if tokens else 'it was whole already'}")
    for kind, count in manifest["refused"]["counts"].items():
        print(f"  left out: {count:,} {kind}")
    for example in manifest["refused"]["examples"]:
        print(f"    {example}")


def _graphs(options: argparse.Namespace) -> int:
    """Write graphs and print what was met. Raises `ConfigError` for what is missing or does not go together."""
    from hildanext.recipe import read_shared, section_of

    run = load_run(options)
    read_shared(run, STAGES)
    section = {**section_of(run, "graphs"), "name": options.graphs}
    if options.source or options.tokenizer or options.shard != "0/1":
        raise ConfigError(
            "--graphs with --source, --tokenizer or --shard", "graphs are characters of the examples' text"
        )
    if not options.path or not options.out:
        raise ConfigError("--graphs needs --path and --out", "--path train.jsonl --out data/gsm8k")

    from hildanext.core.registry import build
    from hildanext.data.causal_graphs import EXTRACTORS
    from hildanext.data.causal_graphs.corpus import write_graphs
    from hildanext.data.causal_graphs.statistics import table

    extractor = build("extractor", EXTRACTORS, section)
    started = time.perf_counter()
    statistics = write_graphs(tuple(options.path), extractor, options.out)
    for name, count, remark in table(statistics["counts"]):
        print(f"{name:<34} {count:>9,}  {remark}".rstrip())
    for example in statistics["refused"]["examples"]:
        print(f"  refused: {example}")
    print(f"{statistics['file']}: {statistics['examples']:,} examples in {time.perf_counter() - started:.1f} s")
    return 0


def _folded(section: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The section `prepare` with the flags in it. Raises `ConfigError` where they would be about several parts."""
    from hildanext.recipe import section_of

    source: dict[str, Any] = {"name": options.source} if options.source else {}
    if options.prompts:
        source["prompts"] = options.prompts
    if options.chat:
        source["chat"] = True
    if options.path:
        source["path"] = options.path[0] if len(options.path) == 1 else options.path
    parts = [name for name in ("train", "valid") if name in section]
    if source and parts:
        raise ConfigError(
            f"--source and its flags are one source, and the run's section 'prepare' has {' and '.join(parts)}",
            f"leave them out, or write --set prepare.{parts[0]}.source.path=FILE",
        )
    if source or "source" in section:
        section["source"] = {**section_of(section, "source"), **source}
    if options.out and not parts:
        section["out"] = options.out
    if options.tokenizer:
        section["tokenizer"] = options.tokenizer
    return section


def _shard(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if not (slash and part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise ConfigError(f"--shard {text!r}", "write I/N with I from 0 to N-1, for example --shard 0/4")
    return int(part), int(parts)


@contextmanager
def _display(quiet: bool) -> Iterator[tuple["OnProgress", dict[str, int], "InputShare"]]:
    """A line with documents, tokens, tokens/s and the time left; the mapping holds what was done in this process."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from hildanext.core.progress import InputShare

    seen = {"documents": 0, "tokens": 0}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(file=sys.stderr)
    share = InputShare(None if quiet or console.is_terminal else console.print)
    begun = shown = time.perf_counter()
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as display:
        task = display.add_task("reading", total=None)

        def progress(documents: int, tokens: int) -> None:
            nonlocal shown
            seen["documents"] += documents
            seen["tokens"] += tokens
            now = time.perf_counter()
            if now - shown > 0.2:
                shown = now
                speed = seen["tokens"] / (now - begun)
                text = (
                    f"{seen['documents']:,} documents  {seen['tokens']:,} tokens  {speed:,.0f} tokens/s{share.left()}"
                )
                display.update(task, description=text)

        yield progress, seen, share
