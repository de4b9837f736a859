"""Stage 2: the model that an earlier stage made (or a named one) gets better at what a reward can check."""

from collections.abc import Mapping
from typing import Any

from hildanext.core.runtime import set_threads
from hildanext.recipe import StageContext

TOGETHER = True
READS = ()


def check(section: Mapping[str, Any], context: StageContext) -> None:
    """Raises `ConfigError` for unknown keys, wrong types, names that do not exist, and combinations without sense."""
    from hildanext.rl_stage2 import check as check_rl

    settings = context.training(section)
    if settings.get("model") is None:
        settings["model"] = context.outcome("model") if context.alone else ""
    check_rl(settings)


def stage(section: Mapping[str, Any], context: StageContext) -> dict[str, Any]:
    """Align, or go on aligning."""
    from hildanext.rl_stage2 import rl

    set_threads(context.threads)
    settings = context.training(section)
    if settings.get("model") is None:
        settings["model"] = str(context.outcome("model"))
    summary = rl(settings, context.stage_dir, context.profile, context.quiet)
    outcome = {"model": summary.get("checkpoint"), "rl_run": str(context.stage_dir), "rl": summary}
    return {**outcome, "whole": summary["whole"]}
