"""Stage 0: on the prepared data the parent becomes a diffusion model, or stays and gets adapters that draft for it."""

from collections.abc import Mapping
from typing import Any

from hildanext.core.runtime import set_threads
from hildanext.recipe import StageContext, section_of

TOGETHER = True
READS = ("data",)
PARTS = ("train", "valid")


def check(section: Mapping[str, Any], context: StageContext) -> None:
    """Raises `ConfigError` for unknown keys, wrong types, block sizes that do not divide, losses that do not exist."""
    convert, data = _sections(section, context)
    check_sections(convert, {**dict.fromkeys(PARTS, ""), **data})
    if context.alone:
        _with_parts(convert, data, context)


def stage(section: Mapping[str, Any], context: StageContext) -> dict[str, Any]:
    """Convert, or go on converting."""
    from hildanext.drafts_stage0 import convert_kept, keeps_parent
    from hildanext.wsd_stage0 import convert

    set_threads(context.threads)
    settings, data = _sections(section, context)
    work = convert_kept if keeps_parent(settings) else convert
    settings = settings if work is convert_kept else _ordinary(settings)
    summary = work(settings, _with_parts(settings, data, context), context.stage_dir, context.profile, context.quiet)
    return {**summary, "model": summary.get("checkpoint"), "run": str(context.stage_dir)}


def check_sections(convert: Mapping[str, Any], data: Mapping[str, Any]) -> Any:
    """The two configurations, of a parent that stays or one that becomes another model. Raises `ConfigError`."""
    from hildanext.drafts_stage0 import check as check_kept
    from hildanext.drafts_stage0 import keeps_parent
    from hildanext.wsd_stage0 import check as check_conversion

    return check_kept(convert, data) if keeps_parent(convert) else check_conversion(_ordinary(convert), data)


def _ordinary(section: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name != "keep_parent"}


def _sections(section: Mapping[str, Any], context: StageContext) -> tuple[dict[str, Any], dict[str, Any]]:
    settings = {"parent": context.start, **context.training(section)}
    return settings, dict(section_of({"data": settings.pop("data", {})}, "data"))


def _with_parts(convert: Mapping[str, Any], data: Mapping[str, Any], context: StageContext) -> dict[str, Any]:
    """The section `data` with the folders that an earlier stage prepared; conversations stand in their place."""
    if convert.get("chat") is not None:
        return {**dict.fromkeys(PARTS, ""), **data}
    return {**{part: context.outcome(part) for part in PARTS if part not in data}, **data}
