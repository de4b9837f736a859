"""`--server URL` of `generate` and `chat`: a running service writes, the text or its denoising shows here.

Any OpenAI-compatible server will do for plain text; thresholds, seeds of our kind and --trace need a HILDA one.
"""

import argparse
import os
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from hildanext.commands import RUNTIME_FLAGS, print_json
from hildanext.commands.generation_flags import Generation, mode_line, read_generation
from hildanext.commands.generation_records import remote_stats_line, save_trace
from hildanext.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hildanext.engine.base import EngineEvent, Request, RequestOutput, Started
    from hildanext.engine.remote.openai import OpenAIEngine

KEY = "HILDA_API_KEY"


def ask(options: argparse.Namespace) -> int:
    """Answer every prompt with the service. Raises what the service refuses or fails at, as `HildaError`."""
    from hildanext.decoding.trace import TRACE_FORMAT

    refuse_local_flags(options)
    asked = read_generation(options)
    requests, prompts = _requests(options, asked), asked.prompts
    engine = connect(options, len(prompts))
    try:
        answers, records = _answers(engine, requests, options, asked)
    finally:
        engine.close()
    server = server_facts(engine, asked)
    rows = [{**prompt.said(), **answer.to_record()} for prompt, answer in zip(prompts, answers, strict=True)]
    if options.trace:
        traced = [{**row, "format": TRACE_FORMAT, "steps": steps} for row, steps in zip(rows, records, strict=True)]
        save_trace(options.trace, server, traced)
    if options.json:
        for row in rows:
            print_json({**row, **server})
    else:
        print(remote_stats_line(answers, server))
    return 0


def refuse_local_flags(options: argparse.Namespace) -> None:
    """Raise `ConfigError` for a flag that says how a model here is to run."""
    misplaced = [name for name in RUNTIME_FLAGS if getattr(options, name) is not None]
    misplaced += ["special-tokens-in-text"] if options.special_tokens_in_text else []
    misplaced += ["plain"] if getattr(options, "plain", False) else []
    if misplaced:
        raise ConfigError(f"--{misplaced[0]} is about a model here, but --server asks one elsewhere", "leave it out")


def connect(options: argparse.Namespace, queue: int) -> "OpenAIEngine":
    """The service as an engine, for so many requests at once. Raises as `OpenAIConfig.connect`."""
    from hildanext.engine.remote.openai import OpenAIConfig

    key = KEY if os.environ.get(KEY) else None
    return OpenAIConfig(base_url=options.server, api_key_env=key, queue=queue).connect(options.model)


def _requests(options: argparse.Namespace, asked: Generation) -> "list[Request]":
    steps = options.trace is not None
    return [
        asked.request(number, prompt.text, asked.turns(prompt), steps) for number, prompt in enumerate(asked.prompts)
    ]


def _answers(
    engine: "OpenAIEngine", requests: "list[Request]", options: argparse.Namespace, asked: Generation
) -> "tuple[list[RequestOutput], list[list[Mapping[str, Any]]]]":
    """All at once on the way out, in order on the way in; beside the answers their steps."""
    from hildanext.engine.base import Failed, Finished, Piece, Started, Stepped

    queues: list[SimpleQueue[EngineEvent]] = [SimpleQueue() for _ in requests]
    for request, events in zip(requests, queues, strict=True):
        engine.submit(request, events.put)
    answers: list[RequestOutput] = []
    records: list[list[Mapping[str, Any]]] = [[] for _ in requests]
    for number, events in enumerate(queues):
        screen = _Shown(options, asked.shown(asked.prompts[number]), alone=len(queues) == 1, first=number == 0)
        with screen:
            while len(answers) == number:
                match events.get():
                    case Started() as started:
                        screen.start(started)
                    case Stepped(record):
                        records[number].append(record)
                        screen.step(record)
                    case Piece(text):
                        screen.piece(text)
                    case Finished(answer):
                        answers.append(answer)
                    case Failed(error):
                        raise error
        screen.end(answers[number])
    return answers, records


class _Shown:
    """One text on the screen: as it arrives where it is the only one, as its denoising with --trace, or when whole."""

    def __init__(self, options: argparse.Namespace, text: str, alone: bool, first: bool) -> None:
        self.text = text
        self.quiet = options.json
        self.watches = options.trace is not None and first and not self.quiet
        self.streams = alone and options.trace is None and not self.quiet
        self.view: Any = None

    def __enter__(self) -> None:
        if self.streams:
            print(self.text, end="", flush=True)

    def __exit__(self, kind: object, *_: object) -> None:
        if self.view is not None:
            self.view.__exit__()
        if self.streams and kind is not None:
            print(flush=True)  # the error gets a line of its own

    def start(self, started: "Started") -> None:
        if not self.watches:
            return
        from hildanext.decoding.trace import TerminalView

        self.view = TerminalView([vars(cell) for cell in started.prompt])
        self.view.__enter__()

    def step(self, record: "Mapping[str, Any]") -> None:
        if self.view is not None:
            self.view.show(record)

    def piece(self, text: str) -> None:
        if self.streams:
            print(text, end="", flush=True)

    def end(self, answer: "RequestOutput") -> None:
        if self.streams:
            print("\n")
        elif not self.quiet:
            print(f"{self.text}{answer.text}\n")


def server_facts(engine: "OpenAIEngine", asked: Generation) -> dict[str, Any]:
    """Who answered; of the decoder only what the server was told."""
    facts, hilda = engine.facts, bool(engine.server.hilda)
    ((mode, section),) = asked.modes.items()
    return {
        "model": facts.model,
        "server": engine.address,
        "engine": engine.server.hilda["engine"]["name"] if hilda else None,
        "dtype": facts.dtype,
        "device": facts.device,
        "block_size": facts.block_size,
        "mode": mode_line(mode) if hilda else None,
        "decoder": section if hilda else {key: section[key] for key in ("temperature", "top_p") if key in section},
    }
