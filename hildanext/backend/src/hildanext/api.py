"""The web service: one engine and one service of jobs behind REST, OpenAI's protocol and a page.

app = create_app(settings, engine, jobs)

`hildanext serve` runs it; so does any ASGI server (then without the bounds on slow
connections, see serve/connection_limits.py).
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache, partial

from anyio import to_thread
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from hildanext import __version__
from hildanext.core.errors import ConfigError
from hildanext.engine.base import Engine
from hildanext.jobs.service import JobService
from hildanext.serve import errors
from hildanext.serve.document import document
from hildanext.serve.metrics import Metrics
from hildanext.serve.middleware import Auth, BodyLimit, RequestId, UnderProfile
from hildanext.serve.routers import chat, completions, generate, health, jobs, models, page
from hildanext.serve.service import Service
from hildanext.serve.settings import ServeConfig

ROUTERS = (health.router, generate.router, models.router, chat.router, completions.router, jobs.router, page.router)


def create_app(settings: ServeConfig, engine: Engine, jobs: JobService | None = None) -> FastAPI:
    """The service around an engine, which it closes when it ends, and jobs, which it supervises while it runs.

    Raises `ConfigError` where the key is to come from an environment variable that holds none.
    """
    key = read_key(settings)
    metrics = Metrics(engine, jobs)
    app = FastAPI(
        title="HILDA",
        version=__version__,
        summary="Editable block-diffusion language models, and jobs that make them.",
        docs_url=None,  # FastAPI's own pages load scripts from elsewhere; `page.docs` does not
        redoc_url=None,
        lifespan=_lifespan,
        middleware=_middleware(settings, key, metrics),
    )
    app.state.service = Service(settings, engine, jobs, metrics)
    errors.install(app)
    for router in ROUTERS:
        app.include_router(router)
    app.openapi = cache(partial(document, app, key is not None))  # type: ignore[method-assign]  # FastAPI's own way
    return app


def read_key(settings: ServeConfig) -> str | None:
    """The key that clients must send, from the environment. Raises `ConfigError`."""
    if settings.api_key_env is None:
        return None
    key = os.environ.get(settings.api_key_env, "")
    if not key or not key.isascii() or key != key.strip():
        raise ConfigError(
            f"the environment variable {settings.api_key_env!r} holds no key", "set it to ASCII text, or leave it out"
        )
    return key


def _middleware(settings: ServeConfig, key: str | None, metrics: Metrics) -> list[Middleware]:
    """Outermost first."""
    stack = [Middleware(RequestId, metrics=metrics)]
    if settings.cors:
        allowed = ["Authorization", "Content-Type", "Last-Event-ID", "X-Request-ID"]
        stack.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors),
                allow_methods=["GET", "POST"],
                allow_headers=allowed,
                expose_headers=["X-Request-ID", "Retry-After"],
            )
        )
    return [
        *stack,
        Middleware(Auth, settings=settings, key=key),
        Middleware(BodyLimit, settings=settings),
        Middleware(UnderProfile, profile=settings.profile),
    ]


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    if service.jobs is not None:
        await to_thread.run_sync(service.jobs.start)
    try:
        yield
    finally:
        service.closing.set()
        await to_thread.run_sync(service.engine.close, 0.0)
        if service.jobs is not None:
            await to_thread.run_sync(service.jobs.stop)
