"""What the routers share: the engine, the jobs, the settings, and the names under which models answer."""

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import PurePath

from fastapi import Request

from hildanext.engine.base import Engine
from hildanext.jobs.service import JobService
from hildanext.serve.errors import Refused
from hildanext.serve.metrics import Metrics
from hildanext.serve.settings import ServeConfig


@dataclass
class Service:
    """One for an app, at `app.state.service`."""

    settings: ServeConfig
    engine: Engine
    jobs: JobService | None
    metrics: Metrics
    since: float = field(default_factory=time.time)
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the service was told to end: streams that would never end by themselves end then."""

    @property
    def model(self) -> str:
        """Name under which the diffusion model answers."""
        return _public(self.engine.facts.model)

    @property
    def parent(self) -> str | None:
        """Name under which the autoregressive parent answers; never the model's own."""
        if self.engine.facts.parent is None:
            return None
        name = _public(self.engine.facts.parent)
        return name if name != self.model else f"{name}-parent"

    def is_parent(self, name: str) -> bool:
        """Which of the two a name means. Raises `Refused` (404) for any other."""
        if name == self.model:
            return False
        if name == self.parent:
            return True
        there = " and ".join(repr(known) for known in (self.model, self.parent) if known is not None)
        raise Refused(f"no model {name[:80]!r}", f"there is {there}", 404, "model_not_found", "model")

    def the_jobs(self) -> JobService:
        """Raises `Refused` (404) where the service has none."""
        if self.jobs is None:
            raise Refused("this service takes no jobs", "start it with --jobs-folder", 404, "no_jobs")
        return self.jobs


def service_of(request: Request) -> Service:
    """For routes: `Annotated[Service, Depends(service_of)]`."""
    service: Service = request.app.state.service
    return service


def _public(name: str) -> str:
    """A model's name; of a folder's full path only the last part, which says nothing about this machine."""
    return PurePath(name).name if PurePath(name).is_absolute() else name
