"""The whole evaluation in a recipe: likelihoods, quality and speed beside the parent on the held-out part, and tasks.

The section is that of `EvalConfig`, and `quality` (`QualityConfig`) in it names benchmark tasks. Without held-out data
there are the tasks alone.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hildanext.core.config import validate
from hildanext.recipe import StageContext

if TYPE_CHECKING:
    from hildanext.eval.evaluation import EvalConfig
    from hildanext.eval.models import ModelPair

logger = logging.getLogger(__name__)


def check(section: Mapping[str, Any], context: StageContext) -> None:
    """Raises `ConfigError` for unknown keys, wrong types, tasks that do not exist, sizes that do not divide."""
    from hildanext.eval.evaluation import EvalConfig
    from hildanext.eval.runner import QualityConfig

    section = dict(section)
    quality = section.pop("quality", None)
    if quality is not None:
        validate(QualityConfig, quality, where=f"{context.key}.quality")
    validate(EvalConfig, {"model": "", "data": "", "parent": context.parent, **section}, where=context.key)


def stage(section: Mapping[str, Any], context: StageContext) -> dict[str, Any]:
    """Evaluate; the numbers go to `eval.json`, the tasks' to `quality.json` and its `samples`, pictures beside them."""
    from hildanext.eval.evaluation import EvalConfig
    from hildanext.eval.runner import QualityConfig
    from hildanext.eval.task_session import run_session

    section = {"parent": context.parent, **section}
    quality = section.pop("quality", None)
    if "model" not in section:
        section["model"] = str(context.outcome("model"))
    held_out = any("valid" in outcome for outcome in context.outcomes.values())
    if "data" not in section and (quality is None or held_out):
        section["data"] = str(context.outcome("valid"))
    pair, names = open_pair(section["model"], section["parent"] or "", context)
    outcome: dict[str, Any] = {"pictures": []}
    if "data" in section:
        settings = validate(EvalConfig, section, where=context.key)
        _, files = held_out_numbers(pair, settings, context.stage_dir, logger.info)
        outcome["results"] = str(files.pop("json"))
        outcome["pictures"] += [str(path) for path in files.values()]
    if quality is not None:
        config = validate(QualityConfig, quality, where=f"{context.key}.quality")
        _, files = run_session(pair, names, config, context.stage_dir)
        outcome["tasks"] = str(files.pop("json"))
        outcome["pictures"] += [str(path) for path in files.values()]
    return outcome


def open_pair(model: str | None, parent: str | None, context: StageContext) -> "tuple[ModelPair, dict[str, Any]]":
    """The models that are evaluated, on the context's device, and what the results say of them."""
    from hildanext.eval import task_session

    return task_session.open_pair(model, parent, context.runtime)


def held_out_numbers(
    pair: "ModelPair", settings: "EvalConfig", folder: str | Path | None, say: Callable[[str], None] | None
) -> tuple[dict[str, Any], dict[str, Path]]:
    """Likelihoods, quality and speed on prepared shards; the files they were written to, where a folder is given."""
    from hildanext.datasets import PackedDataset
    from hildanext.eval.evaluation import evaluate, save_result

    assert pair.model is not None
    dataset = PackedDataset(settings.data, settings.sequence_length, pad_to_block=settings.pad_to_block)
    result = evaluate(pair.model, pair.tokenizer, pair.parent, dataset, settings, say)
    return result, save_result(result, folder) if folder is not None else {}
