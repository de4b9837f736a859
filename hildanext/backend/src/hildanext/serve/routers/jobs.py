"""The jobs' routes: submit, list, look at, cancel, follow, and take what they made."""

import mimetypes
from collections.abc import AsyncGenerator
from typing import Annotated, Any

import anyio
from anyio import to_thread
from fastapi import APIRouter, Depends, Header, Path, Query
from fastapi import Request as HttpRequest
from fastapi.responses import FileResponse, PlainTextResponse

from hildanext.jobs.base import Job, State
from hildanext.jobs.service import JobService
from hildanext.serve.errors import responses
from hildanext.serve.requests import JobBody
from hildanext.serve.responses import ArtefactAnswer, ArtefactList, JobAnswer, JobList
from hildanext.serve.service import Service, service_of
from hildanext.serve.sse import DOCUMENTED, KEEP_ALIVE, EventStream, event

router = APIRouter(prefix="/jobs", tags=["jobs"])

TheService = Annotated[Service, Depends(service_of)]
Id = Annotated[str, Path(max_length=200, description="as the list of jobs gives it")]
LOOK_SECONDS = 0.3
LARGEST_EVENT = 2**53

SHOWN = {"image/png", "image/svg+xml", "image/jpeg", "application/json", "text/plain"}
"""Kinds of artefacts that a browser may show; all others it offers to keep."""

HARMLESS = {"Content-Security-Policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'"}
"""A file that a job wrote runs no script here, even opened by itself."""


@router.post("/submit", status_code=202, responses=responses(404, 408, 413, 415, 507))
def submit(body: JobBody, service: TheService) -> JobAnswer:
    """Check and queue a stage, or a whole recipe (kind `run`)."""
    return _job_answer(service.the_jobs().submit(body.kind, body.config))


@router.get("", responses=responses(404))
def listing(
    service: TheService,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    before: Annotated[str | None, Query(max_length=200)] = None,
    state: State | None = None,
) -> JobList:
    """The newest first."""
    service_jobs = service.the_jobs()
    jobs = service_jobs.list(limit + 1 if limit < 1000 else limit, before, state)
    more = len(jobs) > limit or (limit == 1000 and len(jobs) == limit)
    jobs = jobs[:limit]
    return JobList(
        jobs=[_job_answer(job) for job in jobs],
        next=jobs[-1].id if jobs and more else None,
        kinds=["run", *service_jobs.kinds],
    )


@router.get("/{id}", responses=responses(404))
def show(id: Id, service: TheService) -> JobAnswer:
    """One job, with what its finished stages returned."""
    jobs = service.the_jobs()
    return _job_answer(jobs.get(id), jobs.outcomes(id))


@router.post("/{id}/cancel", responses=responses(404, 409, 507))
def cancel(id: Id, service: TheService) -> JobAnswer:
    """Stop it; a training saves first."""
    return _job_answer(service.the_jobs().cancel(id))


@router.get(
    "/{id}/events",
    status_code=200,
    response_class=EventStream,
    responses={
        200: {
            "description": "Server-sent events: state, progress, log, metric, then end",
            "content": DOCUMENTED,
        },
        **responses(404),
    },
)
async def events(
    id: Id,
    http: HttpRequest,
    service: TheService,
    after: Annotated[int, Query(ge=0, le=LARGEST_EVENT, description="only events with greater ids")] = 0,
    follow: Annotated[bool, Query(description="wait for more until the job has ended")] = True,
    last_event_id: Annotated[str | None, Header(description="what a browser gives when it comes again")] = None,
) -> EventStream:
    """What happened to it, and what happens."""
    jobs = service.the_jobs()
    await to_thread.run_sync(jobs.get, id)
    if last_event_id is not None and last_event_id.isascii() and last_event_id.isdigit():
        after = max(after, int(last_event_id[:18]))
    return EventStream(_events(jobs, id, after, follow, service, http), lambda: None)


async def _events(
    jobs: JobService, id: str, after: int, follow: bool, service: Service, http: HttpRequest
) -> AsyncGenerator[bytes, None]:
    silent = 0.0
    while not await http.is_disconnected():
        job = await to_thread.run_sync(jobs.get, id)  # asked first: what came before its end is then in the table
        events = await to_thread.run_sync(jobs.events, id, after)
        for occurrence in events:
            yield event(occurrence.as_json(), occurrence.kind, occurrence.id)
            after = occurrence.id
        if events:
            silent = 0.0
            continue
        if job.over or not follow or service.closing.is_set():
            yield event({"state": job.state, "over": job.over}, "end")
            return
        silent += LOOK_SECONDS
        if silent >= service.settings.keep_alive_seconds:
            silent = 0.0
            yield KEEP_ALIVE
        with anyio.move_on_after(LOOK_SECONDS):
            await service.closing.wait()


@router.get("/{id}/log", response_class=PlainTextResponse, responses=responses(404))
def log(id: Id, service: TheService) -> PlainTextResponse:
    """The last part of what its process printed."""
    return PlainTextResponse(service.the_jobs().log(id))


@router.get("/{id}/artefacts", responses=responses(404))
def artefacts(id: Id, service: TheService) -> ArtefactList:
    """The files in its folder."""
    return ArtefactList(
        artefacts=[ArtefactAnswer(**artefact.as_json()) for artefact in service.the_jobs().artefacts(id)]
    )


@router.get(
    "/{id}/artefacts/{name:path}",
    status_code=200,
    response_class=FileResponse,
    responses={200: {"description": "The file", "content": {"*/*": {}}}, **responses(404)},
)
def artefact(id: Id, name: Annotated[str, Path(max_length=4096)], service: TheService) -> FileResponse:
    """One of them. No name leads out of the job's folder."""
    path = service.the_jobs().artefact(id, name)
    kind = str(mimetypes.guess_type(path.name)[0])
    shown = "inline" if kind in SHOWN else "attachment"
    return FileResponse(path, filename=path.name, content_disposition_type=shown, headers=HARMLESS)


def _job_answer(job: Job, outcomes: dict[str, Any] | None = None) -> JobAnswer:
    return JobAnswer(**job.as_json(), outcomes=outcomes)
