"""The whole evaluation: likelihoods, quality and speed beside the parent on held-out data, and benchmark tasks.

The section is that of `EvalConfig`; `quality` (`QualityConfig`) in it names benchmark tasks, `harness`
(`HarnessConfig`) those of lm-evaluation-harness, `text` a file in place of prepared `data`, `dtype` one in place of the
run's. Without held-out data there are the tasks alone.
"""

import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hildanext.core.config import merge, validate
from hildanext.core.errors import ConfigError
from hildanext.core.runtime import RuntimeConfig
from hildanext.recipe import StageContext, section_of

if TYPE_CHECKING:
    from hildanext.eval.evaluation import EvalConfig
    from hildanext.eval.lm_harness_run import HarnessConfig
    from hildanext.eval.models import ModelPair
    from hildanext.eval.runner import QualityConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """A section, resolved: who is evaluated, on what."""

    model: str
    parent: str | None
    """"" is none, None the one that the model's card names."""
    runtime: RuntimeConfig
    held_out: "EvalConfig | None"
    text: str | None
    quality: "QualityConfig | None"
    harness: "HarnessConfig | None"

    def open(self) -> "tuple[ModelPair, dict[str, Any]]":
        """The models, and what the results say of them."""
        from hildanext.eval.task_session import open_pair

        return open_pair(self.model, self.parent, self.runtime)

    def held_out_numbers(
        self, pair: "ModelPair", folder: str | Path | None, say: Callable[[str], None] | None
    ) -> tuple[dict[str, Any], dict[str, Path]]:
        """Likelihoods, quality and speed; the files they were written to, where a folder is given."""
        from hildanext.datasets import PackedDataset
        from hildanext.eval.evaluation import evaluate, save_result

        settings = self.held_out
        assert pair.model is not None and settings is not None
        with tempfile.TemporaryDirectory(prefix="hildanext-eval-") as scratch:
            if self.text is not None:
                settings = replace(settings, data=_prepared(self.text, pair.tokenizer, scratch))
            dataset = PackedDataset(settings.data, settings.sequence_length, pad_to_block=settings.pad_to_block)
            result = evaluate(pair.model, pair.tokenizer, pair.parent, dataset, settings, say)
        return result, save_result(result, folder) if folder is not None else {}


def check(section: Mapping[str, Any], context: StageContext) -> None:
    """Raises `ConfigError` for unknown keys, wrong types, tasks that do not exist, sizes that do not divide."""
    resolve({**section, "model": section.get("model", "")}, context)


def stage(section: Mapping[str, Any], context: StageContext) -> dict[str, Any]:
    """Evaluate; the numbers go to `eval.json`, the tasks' to `quality.json` and its `samples`, pictures beside them."""
    from hildanext.eval.lm_harness_run import HARNESS, run_harness
    from hildanext.eval.task_session import run_session

    section = dict(section)
    if "model" not in section:
        section["model"] = str(context.outcome("model"))
    made = any("valid" in outcome for outcome in context.outcomes.values())
    if not {"data", "text"} & set(section) and (made or not {"quality", "harness"} & set(section)):
        section["data"] = str(context.outcome("valid"))
    asked = resolve(section, context)
    pair, names = asked.open()
    outcome: dict[str, Any] = {"pictures": []}
    if asked.held_out is not None:
        _, files = asked.held_out_numbers(pair, context.stage_dir, logger.info)
        outcome["results"] = str(files.pop("json"))
        outcome["pictures"] += [str(path) for path in files.values()]
    if asked.quality is not None:
        _, files = run_session(pair, names, asked.quality, context.stage_dir)
        outcome["tasks"] = str(files.pop("json"))
        outcome["pictures"] += [str(path) for path in files.values()]
    if asked.harness is not None:
        run_harness(pair, asked.harness, context.stage_dir)
        outcome["harness"] = str(context.stage_dir / HARNESS)
    return outcome


def resolve(section: Mapping[str, Any], context: StageContext) -> Evaluation:
    """Raises as `check`."""
    from hildanext.eval.evaluation import EvalConfig
    from hildanext.eval.lm_harness_run import HarnessConfig
    from hildanext.eval.runner import QualityConfig

    seed = {"seed": context.seed}
    settings = merge({"parent": context.parent, "likelihood": seed, "generation": seed}, section)
    dtype, text = settings.pop("dtype", context.dtype), settings.pop("text", None)
    named = {name: section_of(settings, name) for name in ("quality", "harness") if settings.get(name) is not None}
    settings = {name: value for name, value in settings.items() if name not in ("quality", "harness")}
    tasks = (
        validate(QualityConfig, {**seed, **named["quality"]}, f"{context.key}.quality") if "quality" in named else None
    )
    other = validate(HarnessConfig, named["harness"], f"{context.key}.harness") if "harness" in named else None
    reads = text is not None or "data" in settings
    known = validate(EvalConfig, {"data": "", **settings}, where=context.key)
    if context.alone and not reads and tasks is None and other is None:
        raise ConfigError("nothing to evaluate", "give --data FOLDER (prepared shards), --text FILE or --tasks NAMES")
    if context.alone and reads and not known.model:
        raise ConfigError(
            "--data and --text are about a diffusion model", "name one with --model, or give --tasks alone"
        )
    runtime = RuntimeConfig(context.device, dtype, context.threads)
    return Evaluation(known.model, known.parent, runtime, known if reads else None, text, tasks, other)


def _prepared(text: str, tokenizer: Any, scratch: str) -> str:
    """A text file as shards in a scratch folder."""
    from hildanext.datasets import PrepareConfig, prepare

    out = str(Path(scratch) / "shards")
    source, has_bos = {"name": "tinystories", "path": text}, tokenizer.bos_token is not None
    prepare(validate(PrepareConfig, {"source": source, "out": out, "add_bos": has_bos}, where="eval"), tokenizer)
    return out
