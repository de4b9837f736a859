"""POST /v1/completions: texts that go on, for one prompt or several."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest

from hildanext.engine.base import TokenScore
from hildanext.serve.decoding_params import check_length
from hildanext.serve.errors import Refused, responses
from hildanext.serve.openai_common import REASONS, Call, Dialect, Wishes, streamed
from hildanext.serve.requests import CompletionBody
from hildanext.serve.responses import CompletionAnswer, CompletionChoice
from hildanext.serve.service import Service, service_of
from hildanext.serve.sse import EventStream

router = APIRouter(tags=["openai"])


class CompletionDialect(Dialect):
    prefix = "cmpl"
    chunk = "text_completion"

    def opening(self) -> None:
        return None

    def piece(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def logprobs(self, scores: Sequence[TokenScore], top: bool) -> dict[str, Any]:
        ends = accumulate((len(one.text) for one in scores), initial=0)
        best = [None if one.best is None else {one.best: one.best_logprob} for one in scores]
        return {
            "tokens": [one.text for one in scores],
            "token_logprobs": [one.logprob for one in scores],
            "top_logprobs": best if top else None,
            "text_offset": list(ends)[: len(scores)],
        }


@router.post(
    "/v1/completions",
    response_model=CompletionAnswer,
    responses=streamed("Texts, or chunks of them") | responses(404, 408, 413, 415, 499, 502, 504),
)
async def completions(
    body: CompletionBody, http: HttpRequest, service: Annotated[Service, Depends(service_of)]
) -> CompletionAnswer | EventStream:
    """Continue one prompt or several, as text or as token ids."""
    if body.best_of not in (None, body.n if body.n is not None else 1):
        raise Refused(f"best_of {body.best_of}", "is not supported beyond n: leave it out", param="best_of")
    prompts = _prompts(body, service)
    wishes = Wishes(logprobs=body.logprobs is not None, top=bool(body.logprobs), echo=bool(body.echo))
    call = Call(service, body, CompletionDialect(), prompts, body.max_tokens, wishes)
    if body.stream:
        engine_call = await call.ask(http)
        return EventStream(call.chunks(engine_call), engine_call.close)
    head = await call.answer(http)
    choices = [
        CompletionChoice(
            index=index,
            text=choice.prompt + choice.answer.text,
            logprobs=call.probabilities(choice),  # type: ignore[arg-type]
            finish_reason=REASONS[choice.answer.finish_reason],
        )
        for index, choice in enumerate(call.choices)
        if choice.answer is not None
    ]
    return CompletionAnswer(choices=choices, **head)


def _prompts(body: CompletionBody, service: Service) -> list[Mapping[str, Any]]:
    prompts = [body.prompt or ""] if body.prompt is None or isinstance(body.prompt, str) else body.prompt
    if isinstance(prompts[0], int):
        return [{"tokens": tuple(prompts)}]
    if isinstance(prompts[0], list):
        return [{"tokens": tuple(ids)} for ids in prompts]
    check_length(prompts, service.settings, "prompt")
    return [{"prompt": text} for text in prompts]
