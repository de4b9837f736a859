"""Stage 0: the parent becomes a diffusion model on the prepared data."""

from collections.abc import Mapping
from typing import Any

from hildanext.recipe import StageContext

TOGETHER = True
READS = ("data",)


def check(section: Mapping[str, Any], context: StageContext) -> None:
    """Raises `ConfigError` for unknown keys, wrong types, block sizes that do not divide, losses that do not exist."""
    from hildanext.wsd_stage0 import check as check_conversion

    convert, data = _sections(section, context)
    earlier = {} if context.alone else {"train": "", "valid": ""}
    check_conversion(convert, {**earlier, **data})


def stage(section: Mapping[str, Any], context: StageContext) -> dict[str, Any]:
    """Convert, or go on converting."""
    from hildanext.core.runtime import set_threads
    from hildanext.wsd_stage0 import convert

    set_threads(context.threads)
    settings, data = _sections(section, context)
    for part in ("train", "valid"):
        if part not in data:
            data[part] = context.outcome(part)
    summary = convert(settings, data, context.stage_dir, context.profile, context.quiet)
    return {**summary, "model": summary.get("checkpoint"), "run": str(context.stage_dir)}


def _sections(section: Mapping[str, Any], context: StageContext) -> tuple[dict[str, Any], dict[str, Any]]:
    settings = {"parent": context.start, **context.training(section)}
    return settings, dict(settings.pop("data", {}))
