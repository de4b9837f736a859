"""One self-contained page about the run: what was done, the curves, the numbers, the samples."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hildanext.core.config import config, validate
from hildanext.recipe import StageContext, finished


@config
class ReportConfig:
    """What the page is about, and how it is called."""

    title: str = ""
    run: str | None = None
    """The folder of another run; None is the one that this stage belongs to."""


def check(section: Mapping[str, Any], context: StageContext) -> None:
    """Raises `ConfigError` for an unknown key."""
    validate(ReportConfig, section, where=context.key)


def stage(section: Mapping[str, Any], context: StageContext) -> dict[str, Any]:
    """Write `report.html` into the run's folder."""
    from hildanext.report.html import write_report

    settings = validate(ReportConfig, section, where=context.key)
    folder = context.folder if settings.run is None else Path(settings.run)
    outcomes = context.outcomes if settings.run is None else finished(folder)
    path = write_report(folder, outcomes, settings.title or folder.name, into=context.folder)
    return {"report": str(path)}
