"""The whole evaluation in a recipe: likelihoods, quality and speed beside the parent on the held-out part, and tasks.

The section is that of `EvalConfig`, and `quality` (`QualityConfig`) in it names benchmark tasks. Without held-out data
there are the tasks alone.
"""

import logging
from collections.abc import Mapping
from typing import Any

from hildanext.core.config import validate
from hildanext.recipe import StageContext

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
    from hildanext.core.runtime import RuntimeConfig
    from hildanext.datasets import PackedDataset
    from hildanext.eval.evaluation import EvalConfig, evaluate, save_result
    from hildanext.eval.runner import QualityConfig
    from hildanext.eval.task_session import open_pair, run_session

    given = {"parent": context.parent, **section}
    quality = given.pop("quality", None)
    if "model" not in given:
        given["model"] = str(context.outcome("model"))
    held_out = any("valid" in outcome for outcome in context.outcomes.values())
    if "data" not in given and (quality is None or held_out):
        given["data"] = str(context.outcome("valid"))
    runtime = RuntimeConfig(context.device, context.dtype, context.threads)
    pair, who = open_pair(given["model"], given["parent"] or "", runtime)
    outcome: dict[str, Any] = {"pictures": []}
    if "data" in given:
        settings = validate(EvalConfig, given, where=context.key)
        assert pair.model is not None
        dataset = PackedDataset(settings.data, settings.sequence_length, pad_to_block=settings.pad_to_block)
        result = evaluate(pair.model, pair.tokenizer, pair.parent, dataset, settings, logger.info)
        files = save_result(result, context.room)
        outcome["results"] = str(files.pop("json"))
        outcome["pictures"] += [str(path) for path in files.values()]
    if quality is not None:
        config = validate(QualityConfig, quality, where=f"{context.key}.quality")
        _, files = run_session(pair, who, config, context.room)
        outcome["tasks"] = str(files.pop("json"))
        outcome["pictures"] += [str(path) for path in files.values()]
    return outcome
