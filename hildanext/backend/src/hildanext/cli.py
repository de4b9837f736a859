"""The command line: a verb, its flags, and one line for whatever goes wrong.

hildanext --help
hildanext run hildanext/runs/configs/demo.json
hildanext generate --prompt "Once upon a time" --mode S_MODE
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from contextvars import copy_context
from typing import NoReturn

from hildanext import __version__
from hildanext.core.errors import HildaError
from hildanext.core.json_text import has_half
from hildanext.core.logging_setup import quieten_libraries

VERBS: dict[str, tuple[str, str]] = {
    "run": ("hildanext.commands.run", "run a recipe: stages in order, resumable"),
    "check": ("hildanext.commands.check", "validate a run's configuration without loading weights"),
    "pull": ("hildanext.commands.pull", "fetch a model"),
    "models": ("hildanext.commands.models", "list, show and remove what is here"),
    "prepare": ("hildanext.commands.prepare", "turn text into packed token shards"),
    "explain-graph": ("hildanext.commands.explain_graph", "draw the causal graph of one training example"),
    "convert": ("hildanext.commands.convert", "stage 0: an autoregressive model becomes a diffusion model"),
    "sft": ("hildanext.commands.sft", "stage 1: a diffusion model learns to answer, and to mend its own drafts"),
    "rl": ("hildanext.commands.rl", "stage 2: a diffusion model gets better at what a reward can check"),
    "generate": ("hildanext.commands.generate", "prompt in, text out"),
    "chat": ("hildanext.commands.chat", "a conversation in the terminal"),
    "eval": ("hildanext.commands.eval", "likelihoods, quality and speed beside the parent"),
    "bench": ("hildanext.commands.bench", "how fast training and decoding are here"),
    "plan": ("hildanext.commands.plan", "how much memory a run takes, and what would make it fit"),
    "export": ("hildanext.commands.export", "write a model for another program: ONNX"),
    "runs": ("hildanext.commands.runs", "list run folders, and compare some of them"),
    "serve": ("hildanext.commands.serve", "a model behind REST, OpenAI's protocol and a page"),
    "jobs": ("hildanext.commands.jobs", "submit a stage as a background job, and see what becomes of it"),
    "doctor": ("hildanext.commands.doctor", "what this machine can do, and why not"),
}

PLACES = ("out", "folder", "png", "plot", "samples_out", "jobs_folder")
"""Flags that say where something is written."""

WAIT = ("GOMP_SPINCOUNT", "1000")
"""How long a thread of torch waits in a loop before it sleeps. The library's own value, 300 times as much, lets threads
burn what a busy machine's other work needs: drawing samples with `tiny` took 5 times as long, on two contended cores.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0 done, 1 a check that failed, 2 a user's error, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    quieten_libraries()
    if "OMP_WAIT_POLICY" not in os.environ:  # torch, which reads it, is not imported yet
        os.environ.setdefault(*WAIT)
    try:
        return _dispatch(arguments)
    except HildaError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: what was written is whole; the same command resumes", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _dispatch(arguments: list[str]) -> int:
    _refuse_half_characters(arguments)
    parser, of_verb = _parser(arguments)
    try:
        options, unknown = parser.parse_known_args(arguments)
        if unknown:  # the verb's own parser says its usage, where `parse_args` would say that of no verb
            of_verb.error(f"unrecognized arguments: {' '.join(unknown)}")
    except SystemExit as finished:  # argparse has printed its usage and its one line
        return int(finished.code or 0)
    if options.verb is None:
        parser.print_help()
        return 0
    _refuse_nameless_places(options)
    module = importlib.import_module(VERBS[options.verb][0])
    return int(copy_context().run(module.run, options))  # a verb's profile ends with it


def _refuse_nameless_places(options: argparse.Namespace) -> None:
    """An empty name would be the working folder, as a script's unset variable does not mean it."""
    for name in PLACES:
        if getattr(options, name, None) == "":
            raise HildaError(f"--{name.replace('_', '-')} is empty", "say where to write")


def _refuse_half_characters(arguments: Sequence[str]) -> None:
    """Bytes that are no UTF-8 come as halves of characters, which no tokenizer and no file of a run takes."""
    for argument in arguments:
        if has_half(argument):
            raise HildaError(f"the argument {ascii(argument)} is no UTF-8", "give it as UTF-8 (see locale, iconv)")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(" ".join(message.split()))  # one line, whatever was given


def _parser(arguments: Sequence[str]) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The parser, and that of the verb that was asked for (else the same): it alone is imported, and where it comes
    first alone made, so that help is quick."""
    parser = _Parser(
        prog="hildanext",
        description="Any autoregressive transformer becomes an editable discrete-diffusion language model.",
    )
    parser.add_argument("--version", action="version", version=f"hildanext {__version__}")
    rows = parser.add_subparsers(dest="verb", metavar="verb", title="verbs")
    named = next((word for word in arguments if not word.startswith("-")), None)
    shown = [named] if named in VERBS and arguments[0] == named else VERBS
    of_verb = parser
    for verb in shown:
        module, summary = VERBS[verb]
        row = rows.add_parser(verb, help=summary, description=summary)
        if verb == named:
            importlib.import_module(module).configure(row)
            of_verb = row
    return parser, of_verb


if __name__ == "__main__":
    sys.exit(main())
