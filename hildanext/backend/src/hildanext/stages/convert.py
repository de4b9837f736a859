"""Stage 0: the parent becomes a diffusion model on the prepared data."""

from collections.abc import Mapping
from typing import Any

from hildanext.core.runtime import set_threads
from hildanext.recipe import StageContext, section_of

TOGETHER = True
READS = ("data",)
PARTS = ("train", "valid")


def check(section: Mapping[str, Any], context: StageContext) -> None:
    """Raises `ConfigError` for unknown keys, wrong types, block sizes that do not divide, losses that do not exist."""
    from hildanext.wsd_stage0 import check as check_conversion

    convert, data = _sections(section, context)
    check_conversion(convert, {**dict.fromkeys(PARTS, ""), **data})
    if context.alone:
        _with_parts(data, context)


def stage(section: Mapping[str, Any], context: StageContext) -> dict[str, Any]:
    """Convert, or go on converting."""
    from hildanext.wsd_stage0 import convert

    set_threads(context.threads)
    settings, data = _sections(section, context)
    summary = convert(settings, _with_parts(data, context), context.stage_dir, context.profile, context.quiet)
    return {**summary, "model": summary.get("checkpoint"), "run": str(context.stage_dir)}


def _sections(section: Mapping[str, Any], context: StageContext) -> tuple[dict[str, Any], dict[str, Any]]:
    settings = {"parent": context.start, **context.training(section)}
    return settings, dict(section_of({"data": settings.pop("data", {})}, "data"))


def _with_parts(data: Mapping[str, Any], context: StageContext) -> dict[str, Any]:
    """The section `data` with the folders that an earlier stage prepared."""
    return {**{part: context.outcome(part) for part in PARTS if part not in data}, **data}
