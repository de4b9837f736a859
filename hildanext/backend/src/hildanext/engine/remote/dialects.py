"""How a request is put to a server, and what its events mean: OpenAI's protocol, and HILDA's own.

A HILDA server is asked by its own route, which tells tokens, steps and forwards exactly. Any other gets published
fields only.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hildanext.core.config import plain
from hildanext.core.errors import ConfigError
from hildanext.data.generation_result import GenerationStats
from hildanext.decoding import MODES, make_decoder, make_method
from hildanext.engine.base import Cell, EngineEvent, EngineFailed, Piece, Request, RequestOutput, Started, Stepped
from hildanext.engine.remote.http import ServerEvent, failure, parsed
from hildanext.inference import DEFAULT_NEW_TOKENS

UNKNOWN_ID = -1
"""In place of a token's id where the server tells only how many there are."""

SAMPLING = ("name", "temperature", "top_p", "top_k")
FINISH: Mapping[str, Literal["eos", "stop", "length"]] = {"stop": "eos", "eos": "eos", "length": "length"}


@dataclass(frozen=True)
class Times:
    """On the clock of `time.perf_counter`."""

    submitted: float
    started: float


class Conversation:
    """One request to one server. `events` takes what arrives; `answer` is there once the text is whole."""

    path: str

    def __init__(self, request: Request, times: Times) -> None:
        self.request, self.times = request, times
        self.answer: RequestOutput | None = None
        self.text: list[str] = []
        self.first: float | None = None

    def take(self, event: ServerEvent) -> list[EngineEvent]:
        """What an event tells. Raises `EngineFailed` for one that makes no sense, and the error that it reports."""
        raise NotImplementedError(f"{type(self).__name__} has no take")

    def piece(self, text: Any) -> list[EngineEvent]:
        if not isinstance(text, str):
            raise EngineFailed("the server sent text that is none", "see the server's log")
        if not text:
            return []
        if self.first is None:
            self.first = time.perf_counter()
        self.text.append(text)
        return [Piece(text)]

    def finish(
        self, tokens: list[int], reason: Any, prompt: int, cached: int, stats: GenerationStats, edits: bool
    ) -> None:
        if reason not in ("eos", "stop", "length"):
            raise EngineFailed(f"the server ended the text for {reason!r}", "this engine writes plain text only")
        now = time.perf_counter()
        self.answer = RequestOutput(
            text="".join(self.text),
            tokens=tokens,
            finish_reason=reason,
            prompt_tokens=prompt,
            cached_tokens=cached,
            stats=stats,
            queue_seconds=self.times.started - self.times.submitted,
            first_piece_seconds=(self.first if self.first is not None else now) - self.times.submitted,
            seconds=now - self.times.submitted,
            edits_supported=edits,
        )


class Native(Conversation):
    """POST /generate/stream of a HILDA server."""

    path = "/generate/stream"

    def body(self, parent: bool, deadline_seconds: float | None) -> dict[str, Any]:
        request = self.request
        body: dict[str, Any] = {}
        if request.decoder:
            decoder = dict(request.decoder)
            body["decoder"] = {"name": decoder["name"], **plain(make_method(decoder))}
        if request.tokens is not None:
            body["tokens"] = list(request.tokens)
        elif request.messages:
            body["messages"] = _turns(request)
        else:
            body["prompt"] = request.prompt
        body |= {"seed": request.seed, "ignore_eos": request.ignore_eos, "parent": parent, "frames": request.steps}
        optional = {"max_new_tokens": request.max_new_tokens, "deadline_seconds": deadline_seconds}
        if request.stop:
            body["stop"] = list(request.stop)
        return {**body, **{name: value for name, value in optional.items() if value is not None}}

    def take(self, event: ServerEvent) -> list[EngineEvent]:
        data = parsed(event.data, f"the event {event.name!r}")
        try:
            match event.name:
                case "start":
                    cells = [
                        Cell(cell["position"], cell["token"], cell["text"], bytes=cell.get("bytes"))
                        for cell in data["prompt"]
                    ]
                    waited = self.times.started - self.times.submitted + float(data["queue_seconds"])
                    return [Started(int(data["prompt_tokens"]), int(data["cached_tokens"]), waited, cells)]
                case "frame":
                    return [Stepped({"row": 0, **{k: v for k, v in data.items() if k != "seconds"}})]
                case "block":
                    return self.piece(data["text"])
                case "done":
                    self._done(data)
                case "error":
                    raise failure(data["error"])
        except (KeyError, TypeError, ValueError) as problem:
            raise EngineFailed(f"the event {event.name!r} lacks {problem}", "is it of another version?") from None
        return []

    def _done(self, data: Mapping[str, Any]) -> None:
        usage, timing = data["usage"], data["timing"]
        tokens, forwards, steps = list(data["tokens"]), int(usage["forward_passes"]), int(usage["denoising_steps"])
        pace = float(timing["tokens_per_forward"])
        prefill = forwards - max(round(len(tokens) / pace), 1) if pace > 0 else 0
        stats = GenerationStats(
            prefill_forwards=prefill,
            denoise_forwards=steps if steps else forwards - prefill,
            commit_forwards=forwards - prefill - steps if steps else 0,
            revise_forwards=0,  # told among the denoising ones
            tokens=len(tokens),
            edits=int(usage["edited_tokens"]),
            seconds=len(tokens) / float(timing["tokens_per_second"]) if timing["tokens_per_second"] else 0.0,
            prefill_seconds=float(timing["prefill_seconds"]),
        )
        prompt, cached = int(usage["prompt_tokens"]), int(usage["cached_tokens"])
        self.finish(tokens, data["finish_reason"], prompt, cached, stats, bool(data["edits_supported"]))


class Published(Conversation):
    """POST /v1/chat/completions or /v1/completions of any server."""

    def __init__(self, request: Request, times: Times) -> None:
        super().__init__(request, times)
        self.path = "/v1/chat/completions" if request.messages else "/v1/completions"
        self.usage: Mapping[str, Any] = {}
        self.reason: Any = None
        self.begun = False

    def body(self, model: str, extras: tuple[str, ...], usage: bool) -> dict[str, Any]:
        """Published fields, and of the `extras` those that are wished for."""
        request = self.request
        limit = request.max_new_tokens if request.max_new_tokens is not None else DEFAULT_NEW_TOKENS
        body: dict[str, Any] = {"model": model, "stream": True, "max_tokens": limit, "seed": request.seed}
        if request.messages:
            body["messages"] = _turns(request)
        else:
            body["prompt"] = list(request.tokens) if request.tokens is not None else request.prompt
        body["temperature"] = request.decoder.get("temperature", 0.0)
        if request.decoder.get("top_p") is not None:
            body["top_p"] = request.decoder["top_p"]
        if request.stop:
            body["stop"] = list(request.stop)
        if usage:
            body["stream_options"] = {"include_usage": True}
        return {**body, **{name: value for name, value in extras_of(request).items() if name in extras}}

    def take(self, event: ServerEvent) -> list[EngineEvent]:
        if event.data.strip() == "[DONE]":
            self._done()
            return []
        data = parsed(event.data, "a chunk of the server's")
        if data.get("error"):
            raise failure(data["error"])
        events: list[EngineEvent] = []
        if not self.begun:
            self.begun = True
            known = len(self.request.tokens) if self.request.tokens is not None else 0
            events.append(Started(known, 0, self.times.started - self.times.submitted))
        if isinstance(data.get("usage"), dict):
            self.usage = data["usage"]
        choices = data.get("choices")
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise EngineFailed("a chunk of the server's has no choices", "is it an OpenAI-compatible server?")
        for choice in choices[:1]:
            delta = choice.get("delta") if self.request.messages else choice
            text = delta.get("content" if self.request.messages else "text") if isinstance(delta, dict) else None
            events += self.piece(text if text is not None else "")
            self.reason = choice.get("finish_reason") or self.reason
        return events

    def _done(self) -> None:
        if self.reason is None:
            raise EngineFailed("the server ended the text without a reason", "see the server's log; ask again")
        reason = FINISH.get(self.reason, self.reason) if isinstance(self.reason, str) else self.reason
        if reason == "eos" and self.request.stop:
            reason = "stop"  # the protocol has one word for both
        details = self.usage.get("completion_tokens_details")
        details = details if isinstance(details, dict) else {}
        cached = self.usage.get("prompt_tokens_details")
        forwards, tokens = _count(details, "forward_passes"), _count(self.usage, "completion_tokens")
        seconds = time.perf_counter() - self.times.started
        stats = GenerationStats(
            denoise_forwards=forwards, tokens=tokens, edits=_count(details, "edited_tokens"), seconds=seconds
        )
        known = _count(cached, "cached_tokens") if isinstance(cached, dict) else 0
        prompt = _count(self.usage, "prompt_tokens")
        self.finish([UNKNOWN_ID] * tokens, reason, prompt, known, stats, edits=False)


def extras_of(request: Request) -> dict[str, Any]:
    """Wishes of a request that OpenAI's protocol has no field for, under the names our service has for them."""
    section = dict(request.decoder)
    wishes: dict[str, Any] = {"ignore_eos": True} if request.ignore_eos else {}
    if section.get("top_k") is not None:
        wishes["top_k"] = section["top_k"]
    if section and section["name"] != MODES["S_MODE"]["name"]:
        wishes["decoder"] = section
    elif section:
        usual, chosen = (plain(make_decoder(knobs)) for knobs in (dict(MODES["S_MODE"]), section))
        wishes |= {k: v for k, v in chosen.items() if k not in SAMPLING and v != usual[k]}
    if request.steps:
        wishes["stream_denoising"] = True
    return wishes


def refuse_extras(request: Request, extras: tuple[str, ...]) -> None:
    """Raise `ConfigError` for a wish that would be dropped."""
    lost = [name for name in extras_of(request) if name not in extras]
    if lost:
        raise ConfigError(
            f"the server is not a HILDA one and cannot be asked for {', '.join(lost)}",
            "leave it out, name it in engine.extras where the server knows it, or set engine.ignore_extras",
        )


def _turns(request: Request) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in request.messages]


def _count(counts: Mapping[str, Any], name: str) -> int:
    value = counts.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0
