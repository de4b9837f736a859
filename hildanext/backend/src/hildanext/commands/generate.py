"""Prompt in, text out, while it is being written.

hildanext generate --prompt "Once upon a time" --mode S_MODE
hildanext generate --prompt "Once upon a time" --mode quality --tau-edit off --trace trace.json
hildanext generate --batch prompts.txt --json
hildanext generate --prompt "Once upon a time" --mode exact
hildanext generate --prompt "Once upon a time" --mode exact --model smollm2-135m --drafter ngram
hildanext generate --server http://127.0.0.1:8000 --prompt "Once upon a time" --trace
hildanext generate --model runs/sft-tiny/checkpoint --chat --prompt "Lily has 5 apples. She gets 3. How many?"
"""

import argparse
from typing import TYPE_CHECKING, Any

from hildanext.commands import add_run_flags, print_json
from hildanext.commands.generation_flags import Generation, add_asking_flags, mode_line, read_generation
from hildanext.core.run_dir import check_writable
from hildanext.detokenization import TokenCells

if TYPE_CHECKING:
    from hildanext.data.generation_result import GenerationResult
    from hildanext.data.prompts import Prompt
    from hildanext.exact import LoadedDrafter
    from hildanext.inference import Event
    from hildanext.models.loading.loaded_model import LoadedModel


def configure(parser: argparse.ArgumentParser) -> None:
    add_run_flags(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="text to continue")
    source.add_argument("--batch", metavar="FILE", help="one prompt per line (or a .jsonl file), decoded as one batch")
    parser.add_argument(
        "--chat", action="store_true", help="a prompt is a question, put into the model's chat template"
    )
    parser.add_argument("--system", help="with --chat: what the model is told before the question")
    parser.add_argument(
        "--special-tokens-in-text",
        action="store_true",
        help="with --chat: parse control tokens that a message spells (usually they are text)",
    )
    parser.add_argument(
        "--trace",
        nargs="?",
        const="",
        metavar="FILE",
        help="show the denoising; with FILE keep it there",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt and nothing else")
    add_asking_flags(parser)


def run(options: argparse.Namespace) -> int:
    if options.trace:  # known before an answer is written that it would lose
        check_writable(options.trace)
    if options.server is not None:
        from hildanext.commands.remote import ask

        return ask(options)
    from hildanext.facade import open_for

    asked = read_generation(options, {"generate": {"model": "tiny"}})
    opened: dict[bool, LoadedModel | LoadedDrafter] = {}
    for mode, section in asked.modes.items():
        exact = section["name"] == "exact"
        name = asked.drafts if exact and asked.drafts is not None else asked.model
        if exact not in opened:
            opened[exact] = open_for(section, str(name), asked.runtime, asked.parent)
        model = opened[exact]
        prompts = [_encoded(asked, model.tokenizer, prompt) for prompt in asked.prompts]
        if len(asked.modes) > 1 and not options.json:
            print(f"{mode}:")
        _write(options, model, asked, prompts, {**model.summary(), "mode": mode_line(mode), "decoder": section})
    return 0


def _write(
    options: argparse.Namespace,
    opened: "LoadedModel | LoadedDrafter",
    asked: Generation,
    prompts: list[list[int]],
    machine: dict[str, Any],
) -> None:
    """Answer all prompts in one mode, shown as it happens and as it ends."""
    from hildanext.commands.generation_records import save_trace, stats_line
    from hildanext.decoding.trace import trace_record
    from hildanext.facade import writer_of

    tokenizer, write = opened.tokenizer, writer_of(opened, machine["decoder"])
    watcher = _Watcher(options, [asked.shown(prompt) for prompt in asked.prompts], prompts, tokenizer)
    with watcher:
        results = write(prompts, asked.config, watcher.on_event)
    watcher.finish(results)
    rows = [{**prompt.said(), **result.to_record()} for prompt, result in zip(asked.prompts, results, strict=True)]
    if options.trace:
        texts_of = [TokenCells(tokenizer, prompt) for prompt in prompts]
        traces = [trace_record(result.trace, cells) for result, cells in zip(results, texts_of, strict=True)]
        save_trace(options.trace, machine, [{**row, **trace} for row, trace in zip(rows, traces, strict=True)])
    if options.json:
        for row in rows:
            print_json({**row, **machine})
    else:
        print(stats_line(results, machine, asked.config.batch_size))


def _encoded(asked: Generation, tokenizer: Any, prompt: "Prompt") -> list[int]:
    from hildanext.data.chat_template import encode_chat
    from hildanext.tokenization import encode_prompt

    turns = asked.turns(prompt)
    if turns:
        return encode_chat(tokenizer, turns, asked.special_tokens_in_text)
    return encode_prompt(tokenizer, str(prompt.text))


class _Watcher:
    """Shows what happens while it happens: streamed text, or the denoising itself."""

    def __init__(self, options: argparse.Namespace, texts: list[str], prompts: list[list[int]], tokenizer: Any) -> None:
        self.texts = texts
        self.quiet = options.json
        self.view = None
        if options.trace is not None and not self.quiet:
            from hildanext.decoding.trace import TerminalView

            self.cells = TokenCells(tokenizer, prompts[0])
            self.view = TerminalView(self.cells.prompt())
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
            from hildanext.decoding.trace import step_record

            self.view.show(step_record(event.step, self.cells))

    def finish(self, results: "list[GenerationResult]") -> None:
        """End the stream, or print what was not streamed."""
        if self.quiet:
            return
        if self.streams:
            print("\n")
            return
        for text, result in zip(self.texts, results, strict=True):
            print(f"{text}{result.text}\n")
