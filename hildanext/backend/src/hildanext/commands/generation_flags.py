"""What `generate`, `generate --server` and `chat` all read from their flags: prompts, the decoder, the settings.

Every knob of a decoder is a flag: they are made from the source of the decoders, since importing one loads torch.
"""

import argparse
import ast
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hildanext.commands import add_runtime_flags, open_stage
from hildanext.core.errors import ConfigError
from hildanext.core.knobs import Knob, knobs_in

if TYPE_CHECKING:
    from hildanext.core.runtime import RuntimeConfig
    from hildanext.data.chat_template import Message
    from hildanext.data.prompts import Prompt
    from hildanext.engine.base import Request
    from hildanext.inference import GenerationConfig
    from hildanext.stages.generate import SampleConfig

DECODING = Path(__file__).parents[1] / "decoding"


ENGINES_OWN = ("commit", "cached", "debug")
"""Fields of `GenerationConfig` that an engine decides for itself."""


def add_asking_flags(parser: argparse.ArgumentParser) -> None:
    """Who is asked, here or elsewhere, how it decodes, and where an answer ends."""
    parser.add_argument("--model", help="diffusion checkpoint or draft adapters: a folder, or tiny (default)")
    parser.add_argument(
        "--parent", help="with --mode exact: the parent of draft adapters, where it is not where it was"
    )
    parser.add_argument(
        "--server", metavar="URL", help="ask a running service (its key: environment variable HILDA_API_KEY)"
    )
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    parser.add_argument("--max-new-tokens", type=int)
    add_runtime_flags(parser)
    add_decoder_flags(parser)


def add_decoder_flags(parser: argparse.ArgumentParser) -> None:
    """--decoder, its presets, and a flag for each knob of each decoder; all are also --set decoder.KNOB=VALUE."""
    family = {**knobs_in(DECODING, "DECODERS"), **knobs_in(DECODING, "EXACT")}
    parser.add_argument("--decoder", metavar="NAME", help=f"{', '.join(family)}; any of its knobs: --set decoder.X=Y")
    parser.add_argument(
        "--mode",
        help="S_MODE (default; alias speed), Q_MODE (alias quality), fast (what bench frontier --save measured "
        "for the checkpoint) or exact: the parent's own text, drafted",
    )
    parser.add_argument("--effort", help="instant, low, medium, high or adaptive: knobs laid over the mode")
    parser.set_defaults(knobs=[])
    for name, knobs in family.items():
        group = parser.add_argument_group(f"knobs of {name}")
        for knob in knobs:
            with suppress(argparse.ArgumentError):  # the name is a flag already: --set decoder.X=Y remains
                _add_flag(group, knob)


def _add_flag(group: argparse._ArgumentGroup, knob: Knob) -> None:
    """A flag that gives a pair to `options.knobs`; a switch needs no value."""

    words = knob.type.startswith("Literal[")  # of which `none` may be one

    def read(text: str) -> tuple[str, Any]:
        from hildanext.core.config import read_value

        if words:
            return knob.name, text
        return knob.name, "off" if text.lower() in ("off", "none") else read_value(text)

    switch: dict[str, Any] = {"nargs": "?", "const": (knob.name, True)} if knob.type == "bool" else {}
    kind = "|".join(ast.literal_eval(knob.type.removeprefix("Literal"))) if words else knob.type.upper()
    kind = "NAME|JSON" if kind.startswith("DICT") else kind
    flag, value = f"--{knob.name.replace('_', '-')}", f"{kind}{' or off' if knob.optional else ''}"
    group.add_argument(
        flag, dest="knobs", action="append", type=read, help=knob.help.replace("%", "%%"), metavar=value, **switch
    )


class Generation(NamedTuple):  # as `Knob`: help loads no dataclasses
    """What is asked of a model, here or elsewhere."""

    prompts: "list[Prompt]"
    modes: dict[str, dict[str, Any]]
    """A decoder's section by the mode's name."""
    config: "GenerationConfig"
    model: str | None
    parent: str | None
    """Of draft adapters, in place of the one that their card names."""
    drafts: str | None
    """Whom exact mode asks in place of `model`."""
    chat: bool
    system: str | None
    """Of conversations: what the model is told before them."""
    special_tokens_in_text: bool
    runtime: "RuntimeConfig"

    def turns(self, prompt: "Prompt") -> "tuple[Message, ...]":
        """The conversation that a prompt is; none for a text to go on with."""
        from hildanext.data.chat_template import Message

        if prompt.text is not None and not self.chat:
            return ()
        before = (Message("system", self.system),) if self.system is not None else ()
        turns = prompt.messages if prompt.text is None else (("user", prompt.text),)
        return (*before, *(Message(role, content) for role, content in turns))

    def request(
        self, number: int, text: str | None = None, turns: "tuple[Message, ...]" = (), steps: bool = False
    ) -> "Request":
        """What an engine is asked, in the one mode there is; request `number` draws from the seed + number.

        Raises `ConfigError` where the settings hold what an engine decides for itself.
        """
        from hildanext.engine.base import Request

        (section,), settings = self.modes.values(), self.config
        for name in ENGINES_OWN:
            if getattr(settings, name) != getattr(type(settings), name):
                raise ConfigError(f"generation.{name} is not the asker's, an engine decides it", "leave it out")
        return Request(
            prompt=None if turns else text,
            messages=turns,
            decoder=section,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed + number,
            stop=settings.stop,
            ignore_eos=settings.ignore_eos,
            steps=steps,
            cache=settings.cache,
        )

    def shown(self, prompt: "Prompt") -> str:
        """What stands on the screen before the answer."""
        text = prompt.messages[-1][1] if prompt.text is None else prompt.text
        return text if prompt.text is not None and not self.chat else f"{text}\n"


def read_generation(options: argparse.Namespace, defaults: Mapping[str, Any] | None = None) -> Generation:
    """The section `generate` of the run with the flags in it, checked. Raises `ConfigError` and its like."""
    from hildanext.core.config import validate
    from hildanext.decoding import EXACT
    from hildanext.stages.generate import SampleConfig, decoder_sections, generation_config, runtime_of

    if options.trace == "" and options.json:
        raise ConfigError("--trace shows the denoising, and --json shows nothing", "keep it: --trace FILE")
    section, context = open_stage(options, lambda section: _folded(section, options), defaults, "generate")
    settings = validate(SampleConfig, section, "generate")
    prompts, modes = _prompts(options, settings), decoder_sections(settings, context)
    flag = "--trace" if options.trace is not None else "--server" if options.server is not None else options.verb
    if options.parent is not None and set(modes) != set(EXACT):
        raise ConfigError("--parent is about draft adapters", "add --mode exact, or leave it out")
    if len(modes) > 1 and flag != "generate":
        raise ConfigError(f"{flag} is about one mode, and the run names {', '.join(modes)}", "choose one with --mode")
    config = generation_config(settings, context, trace=options.trace is not None)
    return Generation(
        prompts, modes, config, settings.model, options.parent, settings.drafts, settings.chat, options.system,
        settings.special_tokens_in_text, runtime_of(settings, context),
    )  # fmt: skip


def _folded(section: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The section with the flags in it; --prompt and --batch stand in place of its prompts."""
    from hildanext.core.config import merge
    from hildanext.recipe import section_of

    if options.prompt is not None or options.batch is not None:
        section = {key: value for key, value in section.items() if key not in ("prompts", "prompts_file")}
    flags = {name: getattr(options, name) for name in ("seed", "max_new_tokens", "stop", "effort", "model")}
    flags |= {"special_tokens_in_text": options.special_tokens_in_text or None}
    flags |= {"chat": options.chat or None, "modes": [options.mode] if options.mode is not None else None}
    named = {"decoder": {"name": options.decoder}} if options.decoder is not None else {}
    decoder = {**merge({"decoder": section_of(section, "decoder")}, named)["decoder"], **dict(options.knobs)}
    folded = {**section, **{name: value for name, value in flags.items() if value is not None}, "decoder": decoder}
    if options.server is not None and "fast" in [str(mode).lower() for mode in folded.get("modes") or ()]:
        raise ConfigError("mode 'fast' stands in a checkpoint's card, and --server asks a service", "name its decoder")
    if options.server is None and not folded.get("modes") and "name" not in decoder and _drafts_alone(folded):
        folded["modes"] = ["exact"]
    return folded


def _drafts_alone(section: Mapping[str, Any]) -> bool:
    """Whether the model that is named is a set of draft adapters, which has one mode."""
    from hildanext.models.draft_card import holds_drafts

    model = section.get("model")
    return isinstance(model, str) and model != "tiny" and holds_drafts(model)


def _prompts(options: argparse.Namespace, settings: "SampleConfig") -> "list[Prompt]":
    """Of --prompt or --batch, else of the section. Raises `DataError`, `ConfigError` where --system has no place."""
    from hildanext.data.prompts import Prompt, read_prompts

    file = options.batch if options.batch is not None else settings.prompts_file
    if options.prompt is not None or file is None:
        texts = [options.prompt] if options.prompt is not None else settings.prompts or [""]
        prompts = [Prompt(number, text=text) for number, text in enumerate(texts, 1)]
    else:
        prompts = read_prompts(file)
    conversations = settings.chat or any(prompt.messages for prompt in prompts)
    if settings.special_tokens_in_text and not conversations:
        raise ConfigError("--special-tokens-in-text is for conversations", "add --chat")
    if options.system is None:
        return prompts
    if not settings.chat:
        raise ConfigError("--system is for conversations", "add --chat")
    for prompt in prompts:
        if any(role == "system" for role, _ in prompt.messages):
            raise ConfigError(f"line {prompt.line} has a system's turn of its own", "leave --system out")
    return prompts


def mode_line(name: str) -> str:
    from hildanext.decoding import MODE_MEANS

    return f"{name} (published as {MODE_MEANS[name]})" if name in MODE_MEANS else name
