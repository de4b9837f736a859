"""What both OpenAI routes do: choices of texts, whole or as chunks, and their usage."""

import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fastapi import Request as HttpRequest

from hildanext.data.generation_result import GenerationStats
from hildanext.decoding import EXACT
from hildanext.detokenization import cell_bytes, pieces_of
from hildanext.engine.base import (
    EngineEvent,
    Failed,
    Finished,
    Piece,
    Request,
    RequestOutput,
    Started,
    Stepped,
    TokenScore,
)
from hildanext.exact import ExactStats
from hildanext.serve.canvas import NEVER, Canvas
from hildanext.serve.decoding_params import decoding_params
from hildanext.serve.engine_bridge import EngineCall
from hildanext.serve.errors import Refused, shape_of
from hildanext.serve.requests import OpenAIBody
from hildanext.serve.responses import CompletionTokensDetails, PromptTokensDetails, Usage
from hildanext.serve.service import Service
from hildanext.serve.sse import DOCUMENTED, DONE, KEEP_ALIVE, event

REASONS: Mapping[str, Literal["stop", "length"]] = {"eos": "stop", "stop": "stop", "length": "length"}


class Dialect:
    """How one of the two routes writes what both have."""

    prefix: str
    chunk: str
    """The `object` of a chunk."""

    def opening(self) -> dict[str, Any] | None:
        """What the first chunk of a choice holds; None: there is none."""
        raise NotImplementedError(f"{type(self).__name__} has no opening")

    def piece(self, text: str) -> dict[str, Any]:
        """Text of a choice in a chunk; an empty one for a chunk that says something else."""
        raise NotImplementedError(f"{type(self).__name__} has no piece")

    def logprobs(self, scores: Sequence[TokenScore], top: bool) -> dict[str, Any]:
        """Probabilities of a choice's tokens, with `top` the most probable ones beside them."""
        raise NotImplementedError(f"{type(self).__name__} has no logprobs")


@dataclass
class Choice:
    """One text of a call."""

    canvas: Canvas | None = None
    prompt: str = ""
    """What comes before the text: of an echo alone."""
    characters: int = 0
    answer: RequestOutput | None = None


@dataclass(frozen=True)
class Wishes:
    """What a call wants to be told beside its texts."""

    logprobs: bool = False
    top: bool = False
    """The most probable token in the place of each, too."""
    echo: bool = False
    """Of the prompt what is told of the text."""


class Call:
    """A call of either route: checked, then answered whole or in chunks."""

    def __init__(
        self,
        service: Service,
        body: OpenAIBody,
        dialect: Dialect,
        prompts: Sequence[Mapping[str, Any]],
        tokens: int | None,
        wishes: Wishes,
        effort: str | None = None,
    ) -> None:
        self.service, self.body, self.dialect, self.wishes = service, body, dialect, wishes
        self.parent = service.is_parent(body.model)
        self.n = body.n if body.n is not None else 1
        self.facts = service.engine.facts
        self.scored = wishes.logprobs and (self.parent or wishes.echo)
        """The probabilities are exact likelihoods, not those at which masks were filled."""
        self._check(len(prompts))
        if self.scored:
            body = body.model_copy(update={"block_size": None})
        elif tokens == 0:
            raise Refused("0 new tokens", "ask for one or more, or for echo with logprobs", param="max_tokens")
        params = decoding_params(body, self.facts, service.settings, tokens, effort)
        if self.scored:
            self._check_scores(params.decoder)
        if wishes.top and not self.scored and params.decoder.get("temperature"):
            what = "of tokens that are drawn the most probable ones are not kept"
            raise Refused(what, "set temperature to 0, or ask for no alternatives", param="logprobs")
        shows = bool(body.diffusing or body.stream_denoising or (wishes.logprobs and not self.scored))
        each = [prompt for prompt in prompts for _ in range(self.n)]
        self.requests: list[Request] = [
            replace(
                params.request(prompt, i, shows or (wishes.echo and "tokens" in prompt), self.parent),
                scores=self.scored,
            )
            for i, prompt in enumerate(each)
        ]
        self.choices = [Choice() for _ in each]
        self.id, self.created = f"{dialect.prefix}-{secrets.token_hex(12)}", int(time.time())

    async def ask(self, http: HttpRequest) -> EngineCall:
        return await EngineCall.of(self.service.engine, http.receive, self.requests)

    async def answer(self, http: HttpRequest) -> dict[str, Any]:
        """All of it but the choices, which are filled then."""
        with await self.ask(http) as engine_call:
            while any(choice.answer is None for choice in self.choices):
                happening = await engine_call.next()
                assert happening is not None
                index, event_ = happening
                self._take(index, event_)
                if isinstance(event_, Failed):
                    raise event_.error
        return {"id": self.id, "created": self.created, "model": self.body.model, "usage": self.usage()}

    async def chunks(self, engine_call: EngineCall) -> AsyncGenerator[bytes, None]:
        """Server-sent events of `chunk` objects, and the literal end."""
        opening = self.dialect.opening()
        if opening is not None:
            for index in range(len(self.choices)):
                yield self._chunk(index, opening)
        while any(choice.answer is None for choice in self.choices):
            happening = await engine_call.next(self.service.settings.keep_alive_seconds)
            if happening is None:
                yield KEEP_ALIVE
                continue
            index, happened = happening
            self._take(index, happened)
            for chunk in self._tell(index, happened):
                yield chunk
            if isinstance(happened, Failed):
                yield event(shape_of(happened.error))
                return
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            yield event({**self._head(), "choices": [], "usage": self.usage().model_dump()})
        yield DONE

    def usage(self) -> Usage:
        """A prompt counts once, however many choices it has."""
        answers = [choice.answer for choice in self.choices if choice.answer is not None]
        prompts = sum(answer.prompt_tokens for answer in answers[:: self.n])
        written = sum(len(answer.tokens) for answer in answers)
        exact = ExactStats.total(answer.stats for answer in answers)
        whole = GenerationStats.total(answer.stats for answer in answers)
        steps = sum(answer.stats.denoise_forwards + answer.stats.revise_forwards for answer in answers)
        return Usage(
            prompt_tokens=prompts,
            completion_tokens=written,
            total_tokens=prompts + written,
            completion_tokens_details=CompletionTokensDetails(
                denoising_steps=0 if self.parent else steps,
                forward_passes=whole.forwards,
                edited_tokens=whole.edits,
                drafted_tokens=exact.drafted,
                confirmed_tokens=exact.confirmed,
                tokens_per_forward=whole.tokens_per_forward,
            ),
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=sum(answer.cached_tokens for answer in answers[:: self.n])
            ),
        )

    def probabilities(self, choice: Choice) -> dict[str, Any] | None:
        """Of the kept tokens, where they were asked for."""
        answer = choice.answer
        if not self.wishes.logprobs or answer is None:
            return None
        scores: Sequence[TokenScore] = ()
        if answer.scores is not None:
            scores = answer.scores[0 if self.wishes.echo else answer.prompt_tokens :]
            if self.wishes.echo and self.requests[0].prompt is not None and not scores[0].text:
                scores = scores[1:]  # what begins a document was not sent: harnesses count the tokens of their text
        elif choice.canvas is not None:
            glyphs = choice.canvas.kept(len(answer.tokens), answer.text)
            shown = [(glyph.text, glyph.logprob, glyph.raw) for glyph in glyphs]
            scores = [TokenScore(text, p, raw, text, p, raw) for text, p, raw in shown]
        return self.dialect.logprobs([_sendable(score) for score in scores], self.wishes.top)

    def _check(self, prompts: int) -> None:
        body, most = self.body, self.service.settings.max_choices
        if prompts * self.n > most:
            raise Refused(f"{prompts * self.n} texts are too many", f"prompts times n is {most} at most", param="n")
        if body.stream_options is not None and body.stream_options.include_usage and not body.stream:
            raise Refused("stream_options without a stream", "add stream: true", param="stream_options")
        committed = self.wishes.logprobs and not self.scored
        wants = {"logprobs": committed, "diffusing": body.diffusing, "stream_denoising": body.stream_denoising}
        for name in (name for name, wish in wants.items() if wish):
            if self.parent or (self.wishes.echo and name != "logprobs"):
                raise Refused(f"{name} is about denoising, and {body.model!r} has none", "leave it out", param=name)
            if not self.facts.supports_steps:
                raise Refused(
                    f"the engine {self.facts.engine} does not tell its steps", f"leave {name} out", param=name
                )
            if name != "logprobs" and not body.stream:
                raise Refused(f"{name} without a stream", "add stream: true", param=name)
        if body.diffusing and body.stream_denoising:
            raise Refused(
                "diffusing and stream_denoising", "are two ways to show the same: give one", param="diffusing"
            )

    def _check_scores(self, decoder: Mapping[str, Any]) -> None:
        """Raise `Refused` where the likelihood of single tokens is not known."""
        if not self.facts.supports_scores:
            what = f"the engine {self.facts.engine} tells no likelihoods"
            raise Refused(what, "leave logprobs out", param="logprobs")
        own = self.facts.block_size
        if not self.parent and decoder["name"] not in EXACT and (self.body.block_size or own) != 1:
            beside = f"ask {self.service.parent!r}, " if self.service.parent is not None else ""
            raise Refused(
                f"inside a block of {own} tokens the likelihood of one is not known, only a bound for all",
                f"{beside}set block_size to 1 to score and write token by token, or measure the bound: hildanext eval",
                param="echo",
            )

    def _take(self, index: int, happened: EngineEvent) -> None:
        choice = self.choices[index]
        match happened:
            case Started(prompt_tokens=count, prompt=cells):
                request = self.requests[index]
                if request.steps:
                    choice.canvas = Canvas(count, self.facts.block_size, self.facts.special_tokens)
                if self.wishes.echo:
                    shown = (cell_bytes(vars(cell)) for cell in cells if cell.token not in self.facts.special_tokens)
                    choice.prompt = request.prompt if request.prompt is not None else "".join(pieces_of(shown))
            case Stepped(record) if choice.canvas is not None:
                choice.canvas.apply(record)
            case Piece(text):
                choice.characters += len(text)
            case Finished(answer):
                choice.answer = answer
                self.service.metrics.answered(answer, self.parent)

    def _tell(self, index: int, happened: EngineEvent) -> list[bytes]:
        """The chunks that follow from what happened to a choice."""
        choice, body, dialect = self.choices[index], self.body, self.dialect
        match happened:
            case Stepped(record) if choice.canvas is not None and body.stream_denoising:
                picture = choice.canvas.picture(record, choice.characters)
                return [self._chunk(index, dialect.piece(""), diffusion=picture)]
            case Stepped() if choice.canvas is not None and body.diffusing:
                return [self._chunk(index, dialect.piece(choice.canvas.text()))]
            case Started() if choice.prompt:
                return [self._chunk(index, dialect.piece(choice.prompt))]
            case Piece(text) if not body.diffusing:
                return [self._chunk(index, dialect.piece(text))]
            case Finished(answer):
                last = [self._chunk(index, dialect.piece(answer.text))] if body.diffusing else []
                ending = {
                    **dialect.piece(""),
                    "finish_reason": REASONS[answer.finish_reason],
                    "logprobs": self.probabilities(choice),
                }
                return [*last, self._chunk(index, ending)]
        return []

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": self.dialect.chunk, "created": self.created, "model": self.body.model}

    def _chunk(self, index: int, content: Mapping[str, Any], **more: Any) -> bytes:
        choice = {"index": index, "logprobs": None, "finish_reason": None, **content}
        counted = self.body.stream_options is not None and self.body.stream_options.include_usage
        return event({**self._head(), "choices": [choice], **({"usage": None} if counted else {}), **more})


def _sendable(score: TokenScore) -> TokenScore:
    """With numbers that JSON has: what gets no probability at all is as OpenAI has it."""
    if score.logprob is None or score.best_logprob is None:
        return score
    return replace(score, logprob=max(score.logprob, NEVER), best_logprob=max(score.best_logprob, NEVER))


def streamed(description: str) -> dict[int | str, dict[str, Any]]:
    """The success of a route that answers whole or in chunks, for the OpenAPI document."""
    return {200: {"description": description, "content": DOCUMENTED}}
