"""POST /v1/chat/completions, as OpenAI's clients know it, with denoising beside it where it is asked for."""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest

from hildanext.engine.base import TokenScore
from hildanext.serve.decoding_params import check_length, conversation
from hildanext.serve.errors import Refused, responses
from hildanext.serve.openai_common import REASONS, Call, Dialect, Wishes, streamed
from hildanext.serve.requests import ChatBody
from hildanext.serve.responses import AnswerMessage, ChatAnswer, ChatChoice
from hildanext.serve.service import Service, service_of
from hildanext.serve.sse import EventStream

router = APIRouter(tags=["openai"])

EFFORTS = {"none": "instant", "minimal": "instant", "low": "low", "medium": "medium", "high": "high", "xhigh": "high"}
"""OpenAI's reasoning efforts as ours."""


class ChatDialect(Dialect):
    prefix = "chatcmpl"
    chunk = "chat.completion.chunk"

    def opening(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}}

    def piece(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def logprobs(self, scores: Sequence[TokenScore], top: bool) -> dict[str, Any]:
        content = [
            {
                **_token(one.text, one.logprob, one.raw),
                "top_logprobs": [_token(one.best, one.best_logprob, one.best_raw)] if top else [],
            }
            for one in scores
        ]
        return {"content": content}


@router.post(
    "/v1/chat/completions",
    response_model=ChatAnswer,
    responses=streamed("An answer, or chunks of one") | responses(404, 408, 413, 415, 499, 502, 504),
)
async def chat_completions(
    body: ChatBody, http: HttpRequest, service: Annotated[Service, Depends(service_of)]
) -> ChatAnswer | EventStream:
    """Answer a conversation."""
    messages = conversation(body.messages)
    check_length([message.content for message in messages], service.settings, "messages")
    if body.top_logprobs and not body.logprobs:
        raise Refused("top_logprobs without logprobs", "add logprobs: true", param="top_logprobs")
    wishes = Wishes(logprobs=bool(body.logprobs), top=bool(body.top_logprobs))
    call = Call(service, body, ChatDialect(), [{"messages": messages}], _tokens(body), wishes, _effort(body))
    if body.stream:
        engine_call = await call.ask(http)
        return EventStream(call.chunks(engine_call), engine_call.close)
    head = await call.answer(http)
    choices = [
        ChatChoice(
            index=index,
            message=AnswerMessage(content=choice.answer.text),
            logprobs=call.probabilities(choice),  # type: ignore[arg-type]
            finish_reason=REASONS[choice.answer.finish_reason],
        )
        for index, choice in enumerate(call.choices)
        if choice.answer is not None
    ]
    return ChatAnswer(choices=choices, **head)


def _token(text: str | None, logprob: float | None, raw: bytes) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(raw)}


def _tokens(body: ChatBody) -> int | None:
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise Refused("max_tokens and max_completion_tokens differ", "give one of them", param="max_tokens")
    return body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens


def _effort(body: ChatBody) -> str | None:
    if body.reasoning_effort is None:
        return None
    if body.effort is not None:
        raise Refused("effort and reasoning_effort", "are the same here: give one", param="reasoning_effort")
    return EFFORTS.get(body.reasoning_effort, body.reasoning_effort)
