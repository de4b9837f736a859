"""Stage 1: the diffusion model that an earlier stage made (or a named one) learns to answer."""

from collections.abc import Mapping
from typing import Any

from hildanext.core.runtime import set_threads
from hildanext.recipe import StageContext, section_of

TOGETHER = True
READS = ("chat",)


def check(section: Mapping[str, Any], context: StageContext) -> None:
    """Raises `ConfigError` for unknown keys, wrong types, sources and losses that do not exist."""
    from hildanext.sft_stage1 import check as check_sft

    settings, chat = _sections(section, context)
    if settings.get("parent") is None and settings.get("model") is None:
        settings["model"] = context.outcome("model") if context.alone else ""
    check_sft(settings, chat)


def stage(section: Mapping[str, Any], context: StageContext) -> dict[str, Any]:
    """Fine-tune, or go on fine-tuning."""
    from hildanext.sft_stage1 import sft

    set_threads(context.threads)
    settings, chat = _started(section, context)
    summary = sft(settings, chat, context.stage_dir, context.profile, context.quiet)
    outcome = {"model": summary.get("checkpoint"), "sft_run": str(context.stage_dir), "sft": summary}
    return {**outcome, "whole": summary["whole"]}


def render(section: Mapping[str, Any], context: StageContext) -> dict[str, Any]:
    """The conversations alone, as `stage` will find them ready; what there is of them."""
    from hildanext.sft_stage1 import prepare_data

    return prepare_data(*_started(section, context), context.stage_dir)


def _started(section: Mapping[str, Any], context: StageContext) -> tuple[dict[str, Any], dict[str, Any]]:
    settings, chat = _sections(section, context)
    if settings.get("parent") is None and settings.get("model") is None:
        settings["model"] = str(context.outcome("model"))
    return settings, chat


def _sections(section: Mapping[str, Any], context: StageContext) -> tuple[dict[str, Any], dict[str, Any]]:
    settings = context.training(section)
    return settings, dict(section_of({"chat": settings.pop("chat", {})}, "chat"))
