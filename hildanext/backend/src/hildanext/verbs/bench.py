"""How fast training and decoding are on this machine: tables for people, then one JSON line for scripts.

hildanext bench decode --model tiny
hildanext bench train --model smollm2-135m --set bench.block_size=32
hildanext bench engine --model tiny --parent tiny
hildanext bench serve --url http://127.0.0.1:8000 --clients 8
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hildanext.errors import ConfigError
from hildanext.verbs import add_run_flags, load_run

if TYPE_CHECKING:
    import torch

    from hildanext.models import DiffusionModel

KEY = "HILDA_API_KEY"

EPILOG = """commands to paste:
  hildanext bench decode                                     the embedded model
  hildanext bench decode --model my-checkpoint --parent smollm2-135m
  hildanext bench engine --model my-checkpoint --parent smollm2-135m
  hildanext bench train --model smollm2-135m                 an autoregressive model, converted in memory
  hildanext bench train --model tiny --alignment block --set bench.batch_size=4 --set bench.repeats=9
  hildanext bench train --model smollm2-135m --alignment block --chat gsm8k.jsonl
  hildanext bench serve --url http://127.0.0.1:8000 --clients 8 --parent auto
  hildanext bench serve --url http://127.0.0.1:8000 --rate 4 --cancel-rate 0.2 --deadline 5

--chat measures steps of fine-tuning on conversations (JSON lines), with and without doubling their prompts.
All measure the parts in turns and print medians; the section 'bench' of a run holds the same knobs."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("what", choices=("decode", "engine", "train", "serve"), help="what is measured")
    parser.add_argument(
        "--model",
        help="a diffusion checkpoint (default tiny), or an autoregressive model, untrained; serve: a name there",
    )
    parser.add_argument(
        "--parent",
        help="the autoregressive model beside it (decode, engine: default the card's; serve: a name, or auto)",
    )
    parser.add_argument("--alignment", choices=("block", "parent"), default="parent", help="of an untrained conversion")
    parser.add_argument("--block-size", type=int, help="of an untrained conversion, and of training (default 32)")
    parser.add_argument("--chat", metavar="FILE", help="train: steps of fine-tuning on these conversations")
    parser.add_argument("--dtype", default="auto", help="weights while decoding: fp32, bf16, fp64 or auto (default)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", metavar="FILE", help="write the JSON here too")
    load = parser.add_argument_group(
        "serve", "a load on a running service, ours or another that streams /v1/completions"
    )
    load.add_argument("--url", help="address of the service")
    load.add_argument("--clients", type=int, help="closed loop: requests open at the same time (default 4)")
    load.add_argument("--rate", type=float, help="open loop: arrivals per second")
    load.add_argument("--requests", type=int, help="how many (default 32)")
    load.add_argument("--new-tokens", type=int, help="of each (default 64)")
    load.add_argument("--cancel-rate", type=float, help="share of clients that go away")
    load.add_argument("--deadline", type=float, metavar="SECONDS", help="of every request")
    load.add_argument("--seed", type=int)
    load.add_argument("--api-key-env", metavar="NAME", help="environment variable with the key (default HILDA_API_KEY)")
    add_run_flags(parser)


LOAD_FLAGS = {"clients": "clients", "rate": "rate", "requests": "requests", "seed": "seed"} | {
    "new_tokens": "max_new_tokens",
    "cancel_rate": "cancel_rate",
    "deadline": "deadline_seconds",
}
"""Flags of `serve` to its knobs."""


def run(options: argparse.Namespace) -> int:
    from hildanext.runtime import choose_device, choose_dtype, set_threads

    if options.what == "serve":
        return _load(options)
    stray = [name for name in ("url", "api_key_env", *LOAD_FLAGS) if getattr(options, name) is not None]
    if stray:
        raise ConfigError(f"--{stray[0].replace('_', '-')} is about a running service", "use it with bench serve")
    options.model = options.model if options.model is not None else "tiny"
    if options.what == "decode" and options.chat is not None:
        raise ConfigError("--chat is about steps of fine-tuning", "use it with bench train")
    section: dict[str, Any] = dict(load_run(options).get("bench", {}))
    if options.block_size is not None and options.what == "train" and options.chat is None:
        section["block_size"] = options.block_size
    set_threads(options.threads)
    device = choose_device(options.device)
    result, tables = _measure(options, section, device, choose_dtype(options.dtype, device))
    from hildanext.bench.evaluation import machine_line

    _show(options, result, tables, machine_line(result))
    return 0


def _load(options: argparse.Namespace) -> int:
    """`bench serve`: 1 where not one request was answered."""
    from hildanext.bench import serve_load
    from hildanext.config import build

    if options.url is None:
        raise ConfigError("no service was named", "bench serve --url http://127.0.0.1:8000")
    section: dict[str, Any] = dict(load_run(options).get("bench", {}))
    section |= {knob: getattr(options, flag) for flag, knob in LOAD_FLAGS.items() if getattr(options, flag) is not None}
    settings = build(serve_load.ServeLoadKnobs, section, where="bench")
    key = options.api_key_env if options.api_key_env is not None else KEY if os.environ.get(KEY) else None
    result = serve_load.measure(options.url, settings, options.model, options.parent, key, _tell)
    server = result["server"]
    engine = f"server: {server['engine']['name']}, {server['device']}, {server['dtype']}" if server is not None else ""
    client = result["client"]
    _show(options, result, serve_load.tables(result), f"client: {client['cpu']}, {client['cores']} cores; {engine}")
    return 0 if all(one["answered"] for one in result["results"].values()) else 1


def _show(options: argparse.Namespace, result: dict[str, Any], tables: list[Any], footer: str) -> None:
    """Tables for people, a line for scripts."""
    from hildanext.bench.evaluation import wide_console
    from hildanext.runfolder import write_atomically

    console = wide_console()
    for table in tables:
        console.print(table)
    console.print(f"[dim]{footer}[/dim]", highlight=False)
    line = json.dumps(result)
    print(line)
    if options.out is not None:
        write_atomically(Path(options.out), line + "\n")


def _measure(
    options: argparse.Namespace, section: dict[str, Any], device: "torch.device", dtype: "torch.dtype"
) -> tuple[dict[str, Any], list[Any]]:
    import torch

    from hildanext.bench import decode_speed, engine_speed, train_speed
    from hildanext.bench.evaluation import load_baseline
    from hildanext.config import build, merge
    from hildanext.stages.bench import own_parent

    if options.what == "train" and options.chat is not None:
        from hildanext.bench import answer_speed

        source = {"data": {"train": {"name": "files", "path": options.chat}}}
        answering = build(answer_speed.AnswerSpeedKnobs, merge(source, section), where="bench")
        model, tokenizer = _model(options, torch.float32, device)
        result = answer_speed.measure(model, tokenizer, answering, _tell)
        return {"model": options.model, **result}, answer_speed.tables(result)
    if options.what == "train":
        training = build(train_speed.TrainSpeedKnobs, section, where="bench")
        # Weights are fp32 and the step autocasts, as training does.
        result = train_speed.measure(_model(options, torch.float32, device)[0], training, _tell)
        return {"model": options.model, **result}, train_speed.tables(result)
    model, tokenizer = _model(options, dtype, device)
    name = options.parent if options.parent is not None else own_parent(options.model, model)
    parent = load_baseline(name, model) if name else None
    if options.what == "engine":
        load = build(engine_speed.EngineSpeedKnobs, section, where="bench")
        result = engine_speed.measure(model, tokenizer, parent, load, _tell)
        return {"model": options.model, **result}, engine_speed.tables(result)
    decoding = build(decode_speed.DecodeSpeedKnobs, section, where="bench")
    result = decode_speed.measure(model, parent, decoding, _tell)
    return {"model": options.model, **result}, decode_speed.tables(result)


def _model(options: argparse.Namespace, dtype: "torch.dtype", device: "torch.device") -> tuple["DiffusionModel", Any]:
    """A diffusion checkpoint where the name is one, else an autoregressive model under a new card; its tokenizer."""
    from hildanext.stages.bench import open_model

    block = options.block_size if options.block_size is not None else 32
    return open_model(options.model, options.alignment, block, dtype, device, _tell)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
