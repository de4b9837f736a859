"""Stage 1 in a recipe: the diffusion model that an earlier stage made (or a named one) learns to answer."""

from collections.abc import Mapping
from typing import Any

from hildanext.core.errors import TrainingStopped
from hildanext.core.runtime import set_threads
from hildanext.recipe import StageContext

TOGETHER = True
READS = ("chat",)


def check(section: Mapping[str, Any], context: StageContext) -> None:
    """Raises `ConfigError` for unknown keys, wrong types, sources and losses that do not exist."""
    from hildanext.sft_stage1 import check as check_sft

    settings, chat = _sections(section, context)
    if settings.get("parent") is None:
        settings.setdefault("model", "")
    check_sft(settings, chat)


def stage(section: Mapping[str, Any], context: StageContext) -> dict[str, Any]:
    """Fine-tune, or go on fine-tuning. Raises `TrainingStopped` where the configuration stops it early."""
    from hildanext.sft_stage1 import sft

    set_threads(context.threads)
    settings, chat = _sections(section, context)
    if settings.get("parent") is None and settings.get("model") is None:
        settings["model"] = str(context.outcome("model"))
    summary = sft(settings, chat, context.stage_dir, context.profile)
    if not summary["whole"]:
        raise TrainingStopped("fine-tuning stopped before its last token", "run again without train.stop_after")
    return {"model": summary["checkpoint"], "sft_run": str(context.stage_dir), "sft": summary}


def _sections(section: Mapping[str, Any], context: StageContext) -> tuple[dict[str, Any], dict[str, Any]]:
    settings = {"seed": context.seed, "device": context.device, **section}
    return settings, dict(settings.pop("chat", {}))
