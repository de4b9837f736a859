"""A conversation in a terminal, or a piped one: a model here or a running service answers while it writes.

hildanext chat
hildanext chat --model runs/sft-tiny/checkpoint --system "Be brief." --mode Q_MODE
hildanext chat --server http://127.0.0.1:8000
printf 'Hello\\nAnd now?\\n/save talk.jsonl\\n' | hildanext chat
"""

import argparse
import importlib
import io
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hildanext.commands import add_run_flags
from hildanext.commands.generation_flags import Generation, add_asking_flags, mode_line, read_generation
from hildanext.core.errors import ConfigError, HildaError, PromptError, UnknownChoice
from hildanext.core.json_text import check_prompt_text
from hildanext.core.metrics_log import to_json
from hildanext.core.run_dir import expand_home, write_atomically

if TYPE_CHECKING:
    from hildanext.data.chat_template import Message
    from hildanext.engine.base import Engine, RequestOutput

    StatsLine = Callable[[RequestOutput, Generation], str]

PROMPT = "> "
QUIT = "/quit"
EMBEDDED = "tiny"
STORIES = "it knows children's stories alone; --model names one that was fine-tuned on conversations"
HELP = """/reset          forget the conversation; the system's text stays
/mode [NAME]    answer in S_MODE, Q_MODE or exact (or speed, quality) from now on; alone: say which it is
/system [TEXT]  what the model is told before the conversation; alone: nothing
/history        show the conversation
/save FILE      keep it as a line of JSON, as generate --batch, sft and prepare read it
/help           this list
/quit           end, as Ctrl-D does; Ctrl-C stops an answer
//...           a message that begins with a slash"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"in the conversation:\n{HELP}"
    add_run_flags(parser)
    parser.add_argument("--system", help="what the model is told before the conversation")
    parser.add_argument(
        "--plain",
        action="store_true",
        help="write turns as User: and Assistant: for a model without a chat template",
    )
    parser.add_argument(
        "--special-tokens-in-text",
        action="store_true",
        help="parse control tokens that a message spells (usually they are text)",
    )
    add_asking_flags(parser)
    # In place of what the run's section asks: here somebody types.
    parser.set_defaults(prompt="", batch=None, chat=True, trace=None)


def run(options: argparse.Namespace) -> int:
    if options.server is not None:
        from hildanext.commands.remote import refuse_local_flags

        refuse_local_flags(options)
    asked = read_generation(options)
    engine, stats_line = _open(options, asked) if options.server is None else _connect(options)
    try:
        _Chat(options, asked, engine, stats_line).talk()
    finally:
        engine.close()
    return 0


def _open(options: argparse.Namespace, asked: Generation) -> "tuple[Engine, StatsLine]":
    """A model here. The embedded one gets the plain template where nobody names a model, as `serve` does.

    Raises `ConfigError` for a model without a template, and what opening it raises.
    """
    from hildanext.commands.generation_records import stats_line
    from hildanext.data.chat_template import set_template
    from hildanext.decoding import ExactConfig, make_method
    from hildanext.engine.local import LocalEngine, LocalEngineConfig
    from hildanext.models.draft_card import holds_drafts

    settings = LocalEngineConfig(slots=1, special_tokens_in_text=asked.special_tokens_in_text, **vars(asked.runtime))
    model = asked.model or EMBEDDED
    (method,) = (make_method(section) for section in asked.modes.values())
    opened: Engine
    if isinstance(method, ExactConfig) and (model != EMBEDDED or not holds_drafts(EMBEDDED)):
        opened = settings.open_exact(model, asked.parent, "asked for", method.uses_adapters)
    else:  # the embedded model has all modes, for `/mode`
        opened = settings.open(model, EMBEDDED if model == EMBEDDED else None, "asked for")
    assert isinstance(opened, LocalEngine)
    engine = opened
    if isinstance(method, ExactConfig) and engine.exact is not None:
        engine.exact.warm(method)
    facts = engine.facts
    if options.plain or asked.model is None:
        set_template(engine.tokenizer, "auto")
    elif not facts.chat_template:
        engine.close()
        raise ConfigError(f"{facts.model!r} has no chat template", "add --plain to have turns written plainly")

    def line(answer: "RequestOutput", asked: Generation) -> str:
        ((mode, section),) = asked.modes.items()
        return stats_line([answer], {**vars(facts), "mode": mode_line(mode), "decoder": section}, 1)

    return engine, line


def _connect(options: argparse.Namespace) -> "tuple[Engine, StatsLine]":
    from hildanext.commands.generation_records import remote_stats_line
    from hildanext.commands.remote import connect, server_facts

    engine = connect(options, 1)
    return engine, lambda answer, asked: remote_stats_line([answer], server_facts(engine, asked))


class _Chat:
    """What was said, and the loop that reads lines. At a terminal an error is a line and the conversation goes on;
    of a piped one it is the end, since what follows builds on the answer."""

    def __init__(
        self, options: argparse.Namespace, asked: Generation, engine: "Engine", stats_line: "StatsLine"
    ) -> None:
        self.options, self.asked, self.engine, self.stats_line = options, asked, engine, stats_line
        self.system: str | None = options.system
        self.turns: list[Message] = []
        self.saved: set[Path] = set()
        """Files that this conversation may write again."""
        self.typed = sys.stdin.isatty()
        self.commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset,
            "/mode": self._mode,
            "/system": self._tell,
            "/history": self._history,
            "/save": self._save,
            "/help": lambda _: print(HELP),
        }

    def talk(self) -> None:
        """Read and answer until /quit or the end of the input. Raises what an answer raises where nobody types."""
        if isinstance(sys.stdin, io.TextIOWrapper):  # bytes that are no UTF-8 are told of one line, as everywhere
            sys.stdin.reconfigure(errors="surrogateescape", newline=None if self.typed else "\n")
        if self.typed:
            with suppress(ImportError):  # Windows has none
                importlib.import_module("readline")  # gives `input` its editing and its history
            (mode,) = self.asked.modes
            print(f"{self.engine.facts.model}, {mode_line(mode)}; /help lists commands, Ctrl-D ends")
            if self.asked.model is None and self.options.server is None:
                print(STORIES)
        said = self._read().removeprefix("\ufeff")
        while said != QUIT:
            try:
                self._take(said)
            except HildaError as error:
                if not self.typed:
                    raise
                print(error.line(), file=sys.stderr)
            said = self._read()

    def _read(self) -> str:
        """A line; `QUIT` at the end of the input."""
        try:
            return input(PROMPT if self.typed else "").removesuffix("\r")
        except EOFError:
            if self.typed:
                print()
            return QUIT
        except KeyboardInterrupt:
            if not self.typed:
                raise
            print("\n/quit or Ctrl-D ends")
            return ""

    def _take(self, line: str) -> None:
        if not line.startswith("/") or line.startswith("//"):
            if line.strip():
                self._ask(line.removeprefix("/"))
            return
        name, _, rest = line.partition(" ")
        if name not in self.commands:
            raise UnknownChoice("command", name, [*self.commands, QUIT])
        self.commands[name](rest.strip())

    def _ask(self, text: str) -> None:
        """Answer a message. What Ctrl-C leaves of the answer stays in the conversation."""
        from hildanext.data.chat_template import Message
        from hildanext.engine.base import Failed, Finished, Piece, stream

        check_prompt_text(text)
        turns = (*self._before(), Message("user", text))
        request = self.asked.request(len(self.turns) // 2, turns=turns)
        pieces: list[str] = []
        answer: RequestOutput | None = None
        try:
            with closing(stream(self.engine, request)) as events:
                for event in events:
                    match event:
                        case Piece(piece):
                            pieces.append(piece)
                            print(piece, end="", flush=True)
                        case Finished(output):
                            answer = output
                        case Failed(error):
                            if pieces:
                                print(flush=True)  # the error gets a line of its own
                            raise error
        except KeyboardInterrupt:
            if not self.typed:
                raise
            print("\n[stopped]")
        except PromptError as error:
            anew = "; /reset begins anew" if self.turns else ""
            raise PromptError(error.message, f"{error.hint}{anew}") from None
        if answer is not None or pieces:
            self.turns += [turns[-1], Message("assistant", "".join(pieces))]
        if answer is not None:
            print(f"\n\n{self.stats_line(answer, self.asked)}\n", flush=True)

    def _before(self) -> "list[Message]":
        """The conversation, the system's turn included."""
        from hildanext.data.chat_template import Message

        return [*([Message("system", self.system)] if self.system is not None else []), *self.turns]

    def _reset(self, rest: str) -> None:
        _nothing("/reset", rest)
        self.turns, self.saved = [], set()
        print("forgotten")

    def _mode(self, name: str) -> None:
        if name:
            changed = argparse.Namespace(**{**vars(self.options), "mode": name})
            self.options, self.asked = changed, read_generation(changed)
        (mode,) = self.asked.modes
        print(mode_line(mode))

    def _tell(self, text: str) -> None:
        check_prompt_text(text)
        self.system = text or None
        print("the model is told it from now on" if text else "the model is told nothing before the conversation")

    def _history(self, rest: str) -> None:
        _nothing("/history", rest)
        for role, content in self._before():
            print(f"{role}: {content}")

    def _save(self, name: str) -> None:
        """Raises `ConfigError` for a file that this conversation did not write, and what writing raises."""
        if not name or "\0" in name:
            raise ConfigError("/save needs a file", "/save talk.jsonl")
        if not self.turns:
            raise ConfigError("there is no conversation to save", "ask something first")
        path = expand_home(name).absolute()
        if path.exists() and path not in self.saved:
            raise ConfigError(f"{name!r} is there already", "choose another name")
        said = [{"role": role, "content": content} for role, content in self._before()]
        write_atomically(path, to_json({"messages": said}) + "\n")
        self.saved.add(path)
        print(f"written: {name}")


def _nothing(command: str, rest: str) -> None:
    if rest:
        raise ConfigError(f"{command} takes nothing, and was given {rest!r}", "leave it out; /help lists commands")
