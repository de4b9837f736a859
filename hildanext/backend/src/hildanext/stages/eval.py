"""The whole evaluation in a recipe: likelihoods, quality and speed beside the parent, on the held-out part."""

import logging
from collections.abc import Mapping
from typing import Any

from hildanext.config import build
from hildanext.recipe import StageContext

logger = logging.getLogger(__name__)


def check(section: Mapping[str, Any], context: StageContext) -> None:
    """Raises `ConfigError` for unknown keys, wrong types and block sizes that do not divide."""
    from hildanext.bench.evaluation import EvalKnobs

    build(EvalKnobs, {"model": "", "data": "", "parent": context.parent, **section}, where=context.key)


def stage(section: Mapping[str, Any], context: StageContext) -> dict[str, Any]:
    """Evaluate; the numbers go to `eval.json`, the pictures beside it."""
    from hildanext.bench.evaluation import EvalKnobs, evaluate, load_baseline, save_result
    from hildanext.datasets import PackedDataset
    from hildanext.models.load import load_diffusion
    from hildanext.runtime import choose_device, choose_dtype, set_threads

    given = {"parent": context.parent, **section}
    for name, outcome in (("model", "model"), ("data", "valid")):
        if name not in given:
            given[name] = str(context.outcome(outcome))
    settings = build(EvalKnobs, given, where=context.key)
    set_threads(context.threads)
    device = choose_device(context.device)
    model, tokenizer = load_diffusion(settings.model, choose_dtype(context.dtype, device), device)
    parent = load_baseline(settings.parent, model) if settings.parent else None
    dataset = PackedDataset(settings.data, settings.sequence_length, pad_to_block=settings.pad_to_block)
    result = evaluate(model, tokenizer, parent, dataset, settings, logger.info)
    files = save_result(result, context.room)
    return {"results": str(files["json"]), "pictures": [str(path) for name, path in files.items() if name != "json"]}
