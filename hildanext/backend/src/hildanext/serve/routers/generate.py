"""POST /generate and /generate/stream: one text, with everything that can be told of how it came about."""

import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest

from hildanext.engine.base import EngineFailed, Failed, Finished, Piece, Request, RequestOutput, Started, Stepped
from hildanext.exact import ExactStats
from hildanext.serve.decoding_params import DecodingParams, check_length, conversation, decoding_params
from hildanext.serve.engine_bridge import EngineCall
from hildanext.serve.errors import Refused, responses, shape_of
from hildanext.serve.requests import GenerateBody
from hildanext.serve.responses import GenerateAnswer, GenerateUsage, StartEvent, Timing
from hildanext.serve.service import Service, service_of
from hildanext.serve.sse import DOCUMENTED, KEEP_ALIVE, EventStream, event

router = APIRouter(tags=["texts"])

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "Server-sent events: start, frame, block, then done or error", "content": DOCUMENTED}
}


class GenerateCall:
    """One call: what the body asks for, and the answer about it."""

    def __init__(self, service: Service, body: GenerateBody) -> None:
        self.service, self.body = service, body
        self.facts = service.engine.facts
        self.id = f"gen-{secrets.token_hex(12)}"
        self.arrived = time.perf_counter()
        self.decoding_params: DecodingParams = decoding_params(body, self.facts, service.settings, body.max_new_tokens)
        name = service.parent if body.parent else service.model
        if name is None:
            raise Refused("this service has no autoregressive parent", "start it with --parent", param="parent")
        self.model = name

    def request(self, frames: bool) -> Request:
        return self.decoding_params.request(prompt_of(self.body, self.service), 0, frames, self.body.parent)

    def started(self, started: Started) -> dict[str, Any]:
        return StartEvent(
            id=self.id,
            model=self.model,
            engine=self.facts.engine,
            parent=self.body.parent,
            seed=self.decoding_params.seed,
            block_size=None if self.body.parent else self.facts.block_size,
            prompt_tokens=started.prompt_tokens,
            cached_tokens=started.cached_tokens,
            queue_seconds=started.queue_seconds,
            prompt=[cell.__dict__ for cell in started.prompt],  # type: ignore[misc]
            decoder=dict(self.decoding_params.decoder),
        ).model_dump()

    def frame(self, record: Mapping[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in record.items() if key != "row"}
        return {**kept, "seconds": round(time.perf_counter() - self.arrived, 6)}

    def finished(self, answer: RequestOutput, frames: list[dict[str, Any]] | None = None) -> GenerateAnswer:
        stats, exact = answer.stats, ExactStats.total([answer.stats])
        self.service.metrics.answered(answer, self.body.parent)
        # Field by field, not `GenerationResult`'s one form: these names are a promise to clients, grouped for them,
        # and knobs of the request stand among them. A field that the engine renames must not rename theirs.
        return GenerateAnswer(
            id=self.id,
            model=self.model,
            engine=self.facts.engine,
            parent=self.body.parent,
            text=answer.text,
            tokens=answer.tokens,
            finish_reason=answer.finish_reason,
            seed=self.decoding_params.seed,
            decoder=dict(self.decoding_params.decoder),
            edits_supported=answer.edits_supported and not self.body.parent,
            usage=GenerateUsage(
                prompt_tokens=answer.prompt_tokens,
                cached_tokens=answer.cached_tokens,
                completion_tokens=len(answer.tokens),
                total_tokens=answer.prompt_tokens + len(answer.tokens),
                forward_passes=stats.forwards,
                denoising_steps=0 if self.body.parent else stats.denoise_forwards + stats.revise_forwards,
                edited_tokens=stats.edits,
                drafted_tokens=exact.drafted,
                confirmed_tokens=exact.confirmed,
                fed_rows=exact.rows,
            ),
            timing=Timing(
                queue_seconds=answer.queue_seconds,
                prefill_seconds=stats.prefill_seconds,
                first_block_seconds=answer.first_piece_seconds,
                seconds=answer.seconds,
                tokens_per_second=stats.tokens_per_second,
                tokens_per_forward=stats.tokens_per_forward,
            ),
            frames=frames,  # type: ignore[arg-type]
        )


def prompt_of(body: GenerateBody, service: Service) -> dict[str, Any]:
    """The one prompt of a body, by the name it has in the engine's request. Raises `Refused`."""
    named = [name for name in ("prompt", "messages", "tokens") if getattr(body, name) is not None]
    if len(named) != 1:
        raise Refused(f"a text needs one of prompt, messages and tokens, this has {len(named)}", "give exactly one")
    if body.prompt is not None:
        check_length([body.prompt], service.settings, "prompt")
        return {"prompt": body.prompt}
    if body.messages is not None:
        if not body.messages:
            raise Refused("messages is empty", "give at least one", param="messages")
        messages = conversation(body.messages)
        check_length([message.content for message in messages], service.settings, "messages")
        return {"messages": messages}
    return {"tokens": tuple(body.tokens or ())}


@router.post("/generate", responses=responses(404, 408, 413, 415, 499, 502, 504))
async def generate(
    body: GenerateBody, http: HttpRequest, service: Annotated[Service, Depends(service_of)]
) -> GenerateAnswer:
    """Write one text."""
    call = GenerateCall(service, body)
    frames: list[dict[str, Any]] | None = [] if body.frames else None
    requests = [call.request(bool(body.frames))]
    with await EngineCall.of(service.engine, http.receive, requests) as engine_call:
        while (happening := await engine_call.next()) is not None:
            match happening[1]:
                case Stepped(record) if frames is not None:
                    frames.append(call.frame(record))
                case Finished(answer):
                    return call.finished(answer, frames)
                case Failed(error):
                    raise error
    raise EngineFailed("the engine ended without an answer", "report it")


@router.post(
    "/generate/stream",
    status_code=200,
    response_class=EventStream,
    responses=STREAMED | responses(404, 408, 413, 415, 502),
)
async def generate_stream(
    body: GenerateBody, http: HttpRequest, service: Annotated[Service, Depends(service_of)]
) -> EventStream:
    """Write one text, and tell every forward of it."""
    call = GenerateCall(service, body)
    engine_call = await EngineCall.of(service.engine, http.receive, [call.request(body.frames is not False)])
    return EventStream(_events(call, engine_call, service.settings.keep_alive_seconds), engine_call.close)


async def _events(call: GenerateCall, engine_call: EngineCall, patience: float) -> AsyncGenerator[bytes, None]:
    pieces = 0
    while True:
        happening = await engine_call.next(patience)
        match happening[1] if happening is not None else None:
            case None:
                yield KEEP_ALIVE
            case Started() as started:
                yield event(call.started(started), "start")
            case Stepped(record):
                yield event(call.frame(record), "frame")
            case Piece(text):
                seconds = round(time.perf_counter() - call.arrived, 6)
                yield event({"index": pieces, "text": text, "seconds": seconds}, "block")
                pieces += 1
            case Finished(answer):
                yield event(call.finished(answer).model_dump(exclude={"frames"}), "done")
                return
            case Failed(error):
                yield event(shape_of(error), "error")
                return
