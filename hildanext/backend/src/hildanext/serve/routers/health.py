"""GET /health and /metrics: whether the service is well, what it runs, and what it has done."""

import dataclasses
import time
from functools import cache
from typing import Annotated

from fastapi import APIRouter, Depends, Response

from hildanext.core.runtime import versions
from hildanext.decoding import EFFORTS, MODES
from hildanext.serve.decoders import decoder_schemas
from hildanext.serve.errors import Refused, responses
from hildanext.serve.responses import EngineAnswer, HealthAnswer, LiveAnswer, Load
from hildanext.serve.service import Service, service_of

router = APIRouter(tags=["service"])

TheService = Annotated[Service, Depends(service_of)]

LIMITS = (
    "max_body_bytes",
    "max_prompt_characters",
    "max_new_tokens",
    "max_choices",
    "request_seconds",
)

installed = cache(versions)


class NotReady(Refused):
    """The engine does not take requests."""

    retry_after = 5.0


@router.get("/health", responses=responses())
@router.get("/health/ready", responses=responses())
def health(service: TheService) -> HealthAnswer:
    """Readiness, and all that does not change; never asks for a key."""
    facts, load = service.engine.facts, service.engine.load()
    if not facts.ready or not load.alive or service.closing.is_set():
        raise NotReady("the engine takes no requests", "it is closing, or has failed: see the log", 503, "not_ready")
    return HealthAnswer(
        status="ready",
        model=service.model,
        parent=service.parent,
        engine=EngineAnswer(
            name=facts.engine,
            reason=facts.reason,
            slots=facts.slots,
            queue=facts.queue,
            block_size=facts.block_size,
            context=facts.context,
            supports_editing=facts.supports_editing,
            supports_steps=facts.supports_steps,
            drafts=facts.drafts,
            chat_template=facts.chat_template,
            generation_prompt=facts.generation_prompt,
        ),
        device=facts.device,
        dtype=facts.dtype,
        threads=facts.threads,
        versions=installed(),
        load=Load(**dataclasses.asdict(load)),
        uptime_seconds=round(time.time() - service.since, 3),
        jobs=service.jobs is not None,
        key_required=service.settings.api_key_env is not None,
        limits={name: getattr(service.settings, name) for name in LIMITS},
        modes={mode: MODES[mode] for mode in facts.modes},
        efforts=list(EFFORTS),
        decoders=decoder_schemas(),
    )


@router.get("/health/live", responses=responses())
async def live() -> LiveAnswer:
    """The process answers."""
    return LiveAnswer()


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {"description": "Prometheus text", "content": {"text/plain": {"schema": {"type": "string"}}}},
        **responses(),
    },
)
def metrics(service: TheService) -> Response:
    """Counts and gauges for Prometheus."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
