"""How fast training and decoding are on this machine: tables for people, then one JSON line for scripts.

hildanext bench decode --model tiny
hildanext bench train --model smollm2-135m --set bench.block_size=32
hildanext bench engine --model tiny --parent tiny
hildanext bench exact --model my-drafts --parent smollm2-135m --out exact.json
hildanext bench serve --clients 1,2,4,8 --out load.json
hildanext bench serve --url http://127.0.0.1:8000 --clients 8
hildanext bench rl --config methods.json --out runs/methods --jobs 2
hildanext bench frontier --model my-checkpoint --out frontier.json --save
hildanext bench ablations --config hildanext/runs/configs/ablations-tiny.json --out runs/ablations
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hildanext.bench import serve_figure
from hildanext.commands import add_run_flags, add_runtime_flags, load_run, open_stage
from hildanext.commands.serve import chosen_section
from hildanext.core.errors import ConfigError
from hildanext.core.metrics_log import to_json
from hildanext.core.run_dir import check_writable, write_atomically
from hildanext.data.prompts import read_prompts
from hildanext.stages import STAGES

if TYPE_CHECKING:
    from hildanext.bench.serve_load import ServeLoadConfig

KEY = "HILDA_API_KEY"

ALIGNMENTS = ("rl", "rl-gradient", "rl-speed")
FOLDERS = ("rl", "ablations")
"""Whose --out is a folder."""
RESULT = "bench.json"
"""Of these, in their folder."""

EPILOG = """commands to paste:
  hildanext bench decode                                     the embedded model
  hildanext bench decode --model my-checkpoint --parent smollm2-135m
  hildanext bench engine --model my-checkpoint --parent smollm2-135m
  hildanext bench train --model smollm2-135m                 an autoregressive model, converted in memory
  hildanext bench train --model tiny --alignment block --set bench.batch_size=4 --set bench.repeats=9
  hildanext bench train --model smollm2-135m --alignment block --chat gsm8k.jsonl
  hildanext bench exact --model my-drafts --threads 2 --out exact.json        every way to write the parent's text
  hildanext bench peers --model my-drafts --prompts gsm8k.jsonl,stories.txt   ... and llama.cpp on the same weights
  hildanext bench serve --model my-checkpoint --parent smollm2-135m --clients 1,2,4,8 --rate 1,2 --out load.json
  hildanext bench serve --prompts questions.jsonl            the embedded model, asked what a file asks
  hildanext bench serve --url http://127.0.0.1:8000 --clients 8 --parent auto
  hildanext bench serve --url http://127.0.0.1:8000 --rate 4 --cancel-rate 0.2 --deadline 5
  hildanext bench rl --config methods.json --out runs/methods --jobs 2        methods of alignment x seeds
  hildanext bench rl-gradient --model my-checkpoint --set profile=FULL --out gradients.json
  hildanext bench rl-speed --model my-checkpoint --out step.json              a step of rl, part by part
  hildanext bench frontier --model my-checkpoint --prompts stories.txt --out frontier.json
  hildanext bench frontier --model my-checkpoint --save      ... and mode fast decodes with the best setting
  hildanext bench ablations --config ablations.json --out runs/ablations      tables of ways to write

rl and ablations keep what they do in the folder --out, and go on where they were left; tables and pictures lie there.
frontier keeps it beside its --out, in a folder of that name with .cells, and goes on, too.
exact and peers take draft adapters as --model; --out writes JSON, and Markdown and a picture beside it.
--chat measures steps of fine-tuning on conversations (JSON lines), with and without doubling their prompts.
All measure the parts in turns and print medians; the section 'bench' of a run holds the same knobs."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "what",
        choices=("decode", "engine", "train", "exact", "peers", "serve", "frontier", "ablations", *ALIGNMENTS),
        help="what is measured; frontier: tokens per forward and quality over a decoder's knobs, ablations: tables of "
        "ways to write; rl: methods of alignment, rl-gradient: their gradients, rl-speed: a step of them",
    )
    parser.add_argument(
        "--model",
        help="a diffusion checkpoint (default tiny), or an autoregressive model, untrained; exact, peers: draft "
        "adapters; serve --url: a name there",
    )
    parser.add_argument(
        "--parent",
        help="the autoregressive model beside it (decode, engine: default the card's; serve --url: a name, or auto)",
    )
    parser.add_argument("--alignment", choices=("block", "parent"), help="of an untrained conversion (default parent)")
    parser.add_argument("--block-size", type=int, help="of an untrained conversion, and of training (default 32)")
    parser.add_argument("--diffusion", metavar="NAME", help="exact, peers: a diffusion checkpoint to measure, too")
    parser.add_argument("--prompts", metavar="FILE", help="serve, frontier, ablations: ask these, a line each, or JSON "
                        "lines (default: made ones); exact, peers: a file for each kind, behind commas (default: "
                        "three kinds)")  # fmt: skip
    parser.add_argument("--new-tokens", type=int, help="of each answer, where answers are written (default 64)")
    parser.add_argument("--chat", metavar="FILE", help="train: steps of fine-tuning on these conversations")
    add_runtime_flags(parser)
    parser.add_argument("--save", action="store_true", help="frontier: the best setting becomes the model's mode fast")
    parser.add_argument("--out", metavar="FILE", help="write the JSON here too; rl, ablations: the folder they work in")
    parser.add_argument("--jobs", type=int, metavar="N", help="rl: runs at a time, each a process (default 1)")
    load = parser.add_argument_group(
        "serve", "a load on a service of its own, or on a running one, ours or another that streams /v1/completions"
    )
    load.add_argument("--url", help="address of a running service; without it one is started and stopped again")
    load.add_argument("--clients", metavar="N,N", help="closed loops: requests open at the same time (default 4)")
    load.add_argument("--rate", metavar="R,R", help="open loops: arrivals per second")
    load.add_argument("--requests", type=int, help="how many (default 32)")
    load.add_argument("--cancel-rate", type=float, help="share of clients that go away")
    load.add_argument("--deadline", type=float, metavar="SECONDS", help="of every request")
    load.add_argument("--seed", type=int)
    load.add_argument("--api-key-env", metavar="NAME", help="environment variable with the key (default HILDA_API_KEY)")
    add_run_flags(parser)


LOAD_FLAGS = {"requests": "requests", "seed": "seed", "prompts": "prompts_file"} | {
    "new_tokens": "max_new_tokens",
    "cancel_rate": "cancel_rate",
    "deadline": "deadline_seconds",
}
"""Flags of `serve` to its knobs."""


WRITES = ("frontier", "ablations")
"""Tables of ways to write."""
COMPARED = {"prompts": "prompts_file", "new_tokens": "new_tokens", "diffusion": "diffusion"}
"""Flags of `exact` and `peers` to their knobs; the first two are of frontier and ablations, too."""


def run(options: argparse.Namespace) -> int:
    compares = options.what in ("exact", "peers")
    if options.diffusion is not None and not compares:
        raise ConfigError("--diffusion is about ways to write", "use it with bench exact or bench peers")
    if options.jobs is not None and options.what != "rl":
        raise ConfigError("--jobs is about runs of methods", "use it with bench rl")
    if options.save and options.what != "frontier":
        raise ConfigError("--save is about the best setting of a frontier", "use it with bench frontier")
    if options.what in FOLDERS and options.out is None:
        raise ConfigError(f"bench {options.what} keeps every part of it", "give --out FOLDER")
    if options.out is not None:
        check_writable(_result_file(options))
    if options.what == "serve":
        return _load(options)
    writes = compares or options.what in WRITES
    flags = {"url", "api_key_env", "clients", "rate", *LOAD_FLAGS} - (set(COMPARED) if writes else set())
    stray = [name for name in sorted(flags) if getattr(options, name) is not None]
    if stray:
        raise ConfigError(f"--{stray[0].replace('_', '-')} is about a service", "use it with bench serve")
    if options.what in ("decode", *WRITES, *ALIGNMENTS) and options.chat is not None:
        raise ConfigError("--chat is about steps of fine-tuning", "use it with bench train")

    from hildanext.core.console import machine_line
    from hildanext.stages.bench import measure, write_beside

    opened = open_stage(options, lambda section: _folded(section, options), {"bench": {"model": "tiny"}})
    result, tables = measure(*opened, _tell)
    _show(options, result, tables, machine_line(result))
    if options.out is not None:
        written = write_beside(result, _result_file(options))
        if written:
            _tell(f"tables and pictures: {', '.join(str(path) for path in written)}")
    return 0


def _result_file(options: argparse.Namespace) -> Path:
    return Path(options.out) / RESULT if options.what in FOLDERS else Path(options.out)


def _folded(section: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The section `bench` with the flags in it: what is no key of the stage's is a knob of the measurement."""
    from hildanext.core.config import merge
    from hildanext.recipe import section_of
    from hildanext.stages.bench import section_name

    own, knobs = _parted(section)
    flags = {name: getattr(options, name) for name in ("model", "parent", "alignment", "block_size")}
    own |= {name: value for name, value in flags.items() if value is not None}
    what = "answers" if options.chat is not None else options.what
    name = section_name(what)
    if what in ("rl", "rl-speed") and options.model is not None:
        knobs["start"] = options.model
    if options.jobs is not None:
        knobs["jobs"] = options.jobs
    if options.save:
        own["save"] = True
    if what in ("exact", "peers", *WRITES):
        asked = {knob: getattr(options, flag) for flag, knob in COMPARED.items()}
        knobs |= {knob: value for knob, value in asked.items() if value is not None}
    if what == "train" and "block_size" in own:
        knobs["block_size"] = own["block_size"]
    if what == "answers":
        knobs = merge({"data": {"train": {"name": "files", "path": options.chat}}}, knobs)
    return {**own, "what": what, name: merge(section_of(own, name), knobs)}


def _parted(section: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the section `bench` what is about the stage, and the knobs of a measurement."""
    from dataclasses import fields

    from hildanext.stages.bench import BenchConfig

    names = {field.name for field in fields(BenchConfig)}
    return {k: v for k, v in section.items() if k in names}, {k: v for k, v in section.items() if k not in names}


def _load(options: argparse.Namespace) -> int:
    """`bench serve`: 1 where not one request of a load was answered."""
    from hildanext.bench import serve_load
    from hildanext.bench.own_server import own_server

    run = load_run(options)
    loads = _loads(options, run)
    if options.url is not None:
        key = options.api_key_env if options.api_key_env is not None else KEY if os.environ.get(KEY) else None
        result = serve_load.measure(options.url, loads, options.model, options.parent, key, _tell)
    else:
        section = _section_of_server(options, run)
        with own_server(section, _tell) as address:
            result = serve_load.measure(address, loads, None, "auto" if section.get("parent") else None, None, _tell)
    server = result["server"]
    engine = f"server: {server['engine']['name']}, {server['device']}, {server['dtype']}" if server is not None else ""
    client = result["client"]
    _show(options, result, serve_load.tables(result), f"client: {client['cpu']}, {client['cores']} cores; {engine}")
    if options.out is not None:
        picture = serve_figure.draw(result, Path(options.out).with_suffix(".png"))
        _tell(f"picture: {picture}" if picture is not None else "no picture: nothing was answered")
    return 0 if all(done["answered"] for load in result["loads"] for done in load["results"].values()) else 1


def _loads(options: argparse.Namespace, run: dict[str, Any]) -> "list[ServeLoadConfig]":
    """One load for each number of clients and each rate that was named, each with prompts of its own.

    Raises `ConfigError`, and `DataError` for a file of prompts that cannot be read.
    """
    from hildanext.bench.serve_load import ServeLoadConfig
    from hildanext.core.config import validate
    from hildanext.recipe import read_shared, section_of

    section = {"seed": read_shared(run, STAGES).seed, **_parted(dict(section_of(run, "bench")))[1]}
    section |= {knob: getattr(options, flag) for flag, knob in LOAD_FLAGS.items() if getattr(options, flag) is not None}
    named: list[dict[str, Any]] = [
        {**({"rate": None} if flag == "clients" else {}), flag: number}
        for flag in ("clients", "rate")
        for number in _numbers(flag, getattr(options, flag))
    ]
    loads = []
    for number, pace in enumerate(named or [{}]):
        built = validate(ServeLoadConfig, {**section, **pace}, where="bench")
        loads.append(replace(built, seed=built.seed + number * (built.warmup + built.requests)))
    if loads[0].prompts_file is not None:
        read_prompts(loads[0].prompts_file)  # what is wrong with it is known before a model is loaded
    return loads


def _numbers(flag: str, text: str | None) -> list[int] | list[float]:
    """The numbers of a flag, behind commas. Raises `ConfigError`."""
    try:
        words = text.split(",") if text is not None else []
        return [float(word) for word in words] if flag == "rate" else [int(word) for word in words]
    except ValueError:
        raise ConfigError(f"--{flag} {text!r} is no list of numbers", f"write it as --{flag} 1,2,4") from None


def _section_of_server(options: argparse.Namespace, run: dict[str, Any]) -> dict[str, Any]:
    """The section `serve` of the server that is started. Raises `ConfigError`."""
    if options.api_key_env is not None:
        raise ConfigError("--api-key-env is about a running service", "give its --url, too")
    if options.parent == "auto":
        raise ConfigError("--parent auto is what a running service tells", "name the parent, or give --url")
    chosen = chosen_section(run, options, {"model": "tiny", "chat_template": "plain"})
    if options.parent is not None:
        chosen["parent"] = None if options.parent == "none" else options.parent
    return chosen


def _show(options: argparse.Namespace, result: dict[str, Any], tables: list[Any], footer: str) -> None:
    """Tables for people, a line for scripts."""
    from hildanext.core.console import wide_console

    console = wide_console()
    for table in tables:
        console.print(table)
    console.print(f"[dim]{footer}[/dim]", highlight=False)
    line = to_json(result)
    print(line)
    if options.out is not None:
        write_atomically(_result_file(options), line + "\n")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
