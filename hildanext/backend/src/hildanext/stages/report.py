"""One self-contained page about the run: what was done, the curves, the numbers, the samples."""

from collections.abc import Mapping
from typing import Any

from hildanext.config import build, knobs
from hildanext.recipe import StageContext


@knobs
class ReportKnobs:
    """How the page is called."""

    title: str = ""


def check(section: Mapping[str, Any], context: StageContext) -> None:
    """Raises `ConfigError` for an unknown key."""
    build(ReportKnobs, section, where=context.key)


def stage(section: Mapping[str, Any], context: StageContext) -> dict[str, Any]:
    """Write `report.html` into the run's folder."""
    from hildanext.bench.report import write_report

    settings = build(ReportKnobs, section, where=context.key)
    path = write_report(context.folder, context.outcomes, settings.title or context.folder.name)
    return {"report": str(path)}
