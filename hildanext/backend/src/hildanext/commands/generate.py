"""Prompt in, text out, while it is being written.

hildanext generate --prompt "Once upon a time" --mode S_MODE
hildanext generate --prompt "Once upon a time" --mode quality --tau-edit off --trace trace.json
hildanext generate --batch prompts.txt --json
hildanext generate --server http://127.0.0.1:8000 --prompt "Once upon a time" --trace
hildanext generate --model runs/sft-tiny/checkpoint --chat --prompt "Lily has 5 apples. She gets 3. How many?"
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hildanext.commands import add_run_flags, load_run
from hildanext.commands.generation_flags import (
    add_decoder_flags,
    build_generation,
    decoder_section_of,
    mode_line,
    read_prompts,
)

if TYPE_CHECKING:
    from hildanext.inference import Completion, Event


def configure(parser: argparse.ArgumentParser) -> None:
    add_run_flags(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="text to continue")
    source.add_argument("--batch", metavar="FILE", help="one prompt per line, decoded as one batch")
    parser.add_argument(
        "--chat", action="store_true", help="a prompt is a question, put into the model's chat template"
    )
    parser.add_argument("--system", help="with --chat: what the model is told before the question")
    parser.add_argument("--model", help="diffusion checkpoint: a folder, or tiny (default)")
    parser.add_argument(
        "--server", metavar="URL", help="ask a running service (its key: environment variable HILDA_API_KEY)"
    )
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument(
        "--trace",
        nargs="?",
        const="trace.json",
        metavar="FILE",
        help="show the denoising; keep it in FILE (trace.json)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt and nothing else")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="auto, fp32, bf16, fp16 or fp64")
    parser.add_argument("--threads", type=int)
    add_decoder_flags(parser)


def run(options: argparse.Namespace) -> int:
    if options.server is not None:
        from hildanext.commands.remote import ask

        return ask(options)
    from hildanext.core.runtime import choose_device, choose_dtype, set_threads
    from hildanext.inference import generate
    from hildanext.models.loading.load import load_diffusion

    config = load_run(options)
    texts = read_prompts(options)
    section = decoder_section_of(options, config.get("decoder", {}))
    decoder, settings = build_generation(options, section, config.get("generation", {}))
    threads = set_threads(options.threads)
    device = choose_device(options.device)
    name = options.model if options.model is not None else config.get("model", "tiny")
    model, tokenizer = load_diffusion(name, choose_dtype(options.dtype, device), device)
    prompts = [_encoded(options, tokenizer, text) for text in texts]
    watcher = _Watcher(options, [f"{text}\n" for text in texts] if options.chat else texts, prompts, tokenizer)
    with watcher:
        completions = generate(model, tokenizer, prompts, decoder, settings, watcher.on_event)
    machine = {
        "model": str(name),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(device),
        "threads": threads,
        "block_size": model.card.block_size,
        "mode": mode_line(options, section),
        "decoder": section,
    }
    watcher.finish(completions)
    if options.trace:
        _save_trace(options.trace, texts, completions, tokenizer, machine)
    if options.json:
        for text, completion in zip(texts, completions, strict=True):
            print(json.dumps({"prompt": text, **_record(completion), **machine}))
    else:
        print(stats_line(completions, machine, settings.batch_size))
    return 0


def _encoded(options: argparse.Namespace, tokenizer: Any, text: str) -> list[int]:
    from hildanext.core.errors import ConfigError
    from hildanext.data.chat_template import Message, encode_chat
    from hildanext.tokenization import encode_prompt

    if options.chat:
        before = [Message("system", options.system)] if options.system is not None else []
        return encode_chat(tokenizer, [*before, Message("user", text)])
    if options.system is not None:
        raise ConfigError("--system is for conversations", "add --chat")
    return encode_prompt(tokenizer, text)


class _Watcher:
    """Shows what happens while it happens: streamed text, or the denoising itself."""

    def __init__(self, options: argparse.Namespace, texts: list[str], prompts: list[list[int]], tokenizer: Any) -> None:
        self.texts = texts
        self.quiet = options.json
        self.view = None
        if options.trace is not None and not self.quiet:
            from hildanext.decoding.trace import TerminalView

            self.view = TerminalView(prompts[0], tokenizer)
        self.streams = not self.quiet and self.view is None and len(texts) == 1

    def __enter__(self) -> None:
        if self.streams:
            print(self.texts[0], end="", flush=True)
        if self.view is not None:
            self.view.__enter__()

    def __exit__(self, *_: object) -> None:
        if self.view is not None:
            self.view.__exit__()

    def on_event(self, event: "Event") -> None:
        if self.streams and event.kind == "text":
            print(event.text, end="", flush=True)
        elif self.view is not None and event.step is not None and event.row == 0:
            self.view.show(event.step)

    def finish(self, completions: "list[Completion]") -> None:
        """End the stream, or print what was not streamed."""
        if self.quiet:
            return
        if self.streams:
            print("\n")
            return
        for text, completion in zip(self.texts, completions, strict=True):
            print(f"{text}{completion.text}\n")


def _record(completion: "Completion") -> dict[str, Any]:
    from dataclasses import asdict

    stats = asdict(completion.stats)
    for name in ("forwards", "tokens_per_forward", "tokens_per_second"):
        stats[name] = getattr(completion.stats, name)
    return {
        "text": completion.text,
        "tokens": completion.tokens,
        "finish_reason": completion.finish_reason,
        "stats": stats,
    }


def _save_trace(
    path: str, texts: list[str], completions: "list[Completion]", tokenizer: Any, machine: dict[str, Any]
) -> None:
    from hildanext.core.run_dir import write_atomically
    from hildanext.decoding.trace import trace_record

    rows = [
        {"prompt": text, **_record(completion), **trace_record(completion.trace, tokenizer)}
        for text, completion in zip(texts, completions, strict=True)
    ]
    write_atomically(Path(path), json.dumps({**machine, "rows": rows}, indent=1) + "\n")
    print(f"trace: {path}", file=sys.stderr)


def stats_line(completions: "list[Completion]", machine: dict[str, Any], batch_size: int) -> str:
    """Speed and cost of the whole run in one line."""
    tokens = sum(done.stats.tokens for done in completions)
    starts = range(0, len(completions), batch_size)
    seconds = sum(max(done.stats.seconds for done in completions[at : at + batch_size]) for at in starts)
    counts = {
        kind: sum(getattr(done.stats, f"{kind}_forwards") for done in completions)
        for kind in ("prefill", "denoise", "commit", "revise")
    }
    forwards = sum(counts.values())
    knobs = {name: "off" if value is None else value for name, value in machine["decoder"].items() if name != "name"}
    parts = [
        f"{tokens / max(seconds, 1e-9):.1f} tokens/s",
        f"{tokens} tokens",
        f"{forwards} forwards ({', '.join(f'{count} {kind}' for kind, count in counts.items() if count)})",
        f"{tokens / max(forwards - counts['prefill'], 1):.2f} tokens per forward",
        f"{sum(done.stats.edits for done in completions)} edits",
        f"{machine['dtype']} on {machine['device']}, {machine['threads']} threads",
        f"block {machine['block_size']}",
        ", ".join(f"{name} {value}" for name, value in knobs.items()),
        machine["mode"],
    ]
    return "[" + "; ".join(parts) + "]"
