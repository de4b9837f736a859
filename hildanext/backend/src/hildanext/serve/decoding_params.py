"""From the fields of a body to what the engine is asked for, within the service's limits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hildanext.data.chat_template import Message
from hildanext.decoding import MODES, decoder_section, make_method, methods
from hildanext.engine.base import EngineFacts, Request
from hildanext.inference import DEFAULT_NEW_TOKENS
from hildanext.serve.decoders import request_maxima
from hildanext.serve.errors import Refused
from hildanext.serve.requests import KNOBS, OPTIONAL, ChatMessage, Decoding, GenerateBody
from hildanext.serve.settings import ServeConfig

MOST_STOPS = 4
LONGEST_STOP = 1000


@dataclass(frozen=True)
class DecodingParams:
    """What a body says of how its texts are written; the prompts come on top."""

    decoder: Mapping[str, Any]
    max_new_tokens: int | None
    seed: int
    stop: tuple[str, ...]
    ignore_eos: bool
    deadline_seconds: float

    def request(self, prompt: Mapping[str, Any], number: int = 0, steps: bool = False, parent: bool = False) -> Request:
        """The request of choice `number`; `prompt` is one of prompt, messages and tokens by name."""
        return Request(
            **prompt,
            decoder=self.decoder,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed + number,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
            deadline_seconds=self.deadline_seconds,
            steps=steps,
            parent=parent,
        )


def decoding_params(
    body: Decoding, facts: EngineFacts, settings: ServeConfig, tokens: int | None, effort: str | None = None
) -> DecodingParams:
    """Check everything but the prompt. `tokens` is the length asked for, `effort` what stands in for the body's own.

    Raises `Refused`, and the decoder's `ConfigError` or `UnknownChoice`.
    """
    if tokens is not None and tokens > settings.max_new_tokens:
        field = "max_new_tokens" if isinstance(body, GenerateBody) else "max_tokens"
        most = f"this service writes {settings.max_new_tokens} at most"
        raise Refused(f"{tokens} new tokens are too many", most, param=field)
    seconds = body.deadline_seconds if body.deadline_seconds is not None else settings.request_seconds
    if seconds > settings.request_seconds:
        raise Refused(
            f"a deadline of {seconds:g} s is too long",
            f"this service gives {settings.request_seconds:g} s at most",
            param="deadline_seconds",
        )
    return DecodingParams(
        decoder=_decoder(body, facts, effort),
        max_new_tokens=tokens if tokens is not None else _unasked(settings),
        seed=body.seed if body.seed is not None else 0,
        stop=_stop(body.stop),
        ignore_eos=bool(body.ignore_eos),
        deadline_seconds=seconds,
    )


def conversation(messages: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """A developer is a system by another name."""
    return tuple(
        Message("system" if message.role == "developer" else message.role, message.text) for message in messages
    )


def check_length(texts: Sequence[str], settings: ServeConfig, param: str) -> None:
    """Raise `Refused` for prompts that are too long to be tokenised at all."""
    size = sum(len(text) for text in texts)
    if size > settings.max_prompt_characters:
        raise Refused(
            f"{size} characters are too long a prompt",
            f"this service reads {settings.max_prompt_characters} at most",
            code="prompt_too_long",
            param=param,
        )


def _unasked(settings: ServeConfig) -> int | None:
    """The engine's own default, unless the service allows less."""
    return settings.max_new_tokens if settings.max_new_tokens < DEFAULT_NEW_TOKENS else None


def _decoder(body: Decoding, facts: EngineFacts, effort: str | None) -> dict[str, Any]:
    written = {name: getattr(body, name) for name in KNOBS if name in body.model_fields_set}
    knobs = {name: value for name, value in written.items() if value is not None or name in OPTIONAL}
    if body.block_size is not None and body.block_size != facts.block_size:
        own = "not known here" if facts.block_size is None else facts.block_size
        raise Refused(
            f"block_size {body.block_size} is not the model's own ({own})",
            "a checkpoint has one block size: leave it out",
            param="block_size",
        )
    if body.steps is not None and body.steps < (facts.block_size or 0):
        raise Refused(
            f"{body.steps} steps for blocks of {facts.block_size} tokens cannot be promised",
            "a step may fill a single token: choose the pace by effort or tau_mask",
            param="steps",
        )
    mode = body.mode
    if mode is None and "name" not in (body.decoder or {}) and facts.modes[0] != next(iter(MODES)):
        mode = facts.modes[0]
    section = decoder_section(mode, effort if effort is not None else body.effort, body.decoder, facts.fast, **knobs)
    make_method(section, strict=True)
    _offered(section["name"], facts)
    for knob, most in request_maxima(methods()[section["name"]]).items():
        if (section.get(knob) or 0) > most:
            raise Refused(
                f"{knob}: {section[knob]} is above {most}", f"this service takes {most} at most", param="decoder"
            )
    return section


def _offered(name: str, facts: EngineFacts) -> None:
    """Raise `Refused` for a method that no mode here has: exact without a parent, denoising without a model for it."""
    exact = name in MODES
    if (name if exact else next(iter(MODES))) not in facts.modes:
        raise Refused(
            f"{'mode ' + name if exact else name} is not offered here",
            f"there is {', '.join(facts.modes)}",
            param="mode",
        )


def _stop(stop: str | list[str] | None) -> tuple[str, ...]:
    words = () if not stop else (stop,) if isinstance(stop, str) else tuple(stop)
    if len(words) > MOST_STOPS:
        raise Refused(f"{len(words)} stop texts are too many", f"give {MOST_STOPS} at most", param="stop")
    if any(not word or len(word) > LONGEST_STOP for word in words):
        raise Refused("a stop text is empty or too long", f"give 1 to {LONGEST_STOP} characters", param="stop")
    return words
