"""What can be submitted as a job: each stage of a recipe alone, or a recipe; and how a submission is checked.

`jobs` knows no stage. The command line and the service both open it here, so that they agree.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hildanext.core.errors import ConfigError
from hildanext.jobs.service import JobService
from hildanext.stages import STAGES

FOLDER = "runs/jobs"
"""Where jobs live, unless another folder is named."""

COMMAND = (sys.executable, "-m", "hildanext.cli", "run")

TRAINED = ("convert", "sft", "rl")
"""Stages that leave a model."""

NEEDS: Mapping[str, tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = {
    "convert": ((("data.train",), ("prepare",)), (("data.valid",), ("prepare",))),
    "sft": ((("model", "parent"), TRAINED),),
    "rl": ((("model",), TRAINED),),
    "eval": ((("model",), TRAINED), (("data", "quality"), ("prepare",))),
    "bench": ((("model",), TRAINED),),
    "generate": ((("model",), TRAINED),),
    "report": ((("run",), (*TRAINED, "eval", "generate")),),
}
"""By stage: one of these values of the section, or one of these stages before it."""


def open_jobs(folder: str | Path = FOLDER, limit: int = 1) -> JobService:
    """The jobs of a folder, which is made where it is missing; `limit` of them run at a time."""
    return JobService(folder, kinds=STAGES, check=check_submission, command=COMMAND, limit=limit)


def check_submission(run: Mapping[str, Any]) -> None:
    """All that can be known of a recipe before it runs: sections, what stages need and name, and that they stay in
    their folder, which lies beside those of other jobs.

    Raises `ConfigError` and its like.
    """
    from hildanext.recipe import check, read_shared
    from hildanext.stages.named_inputs import check_inputs, value_at

    steps, shared = check(run, STAGES), read_shared(run, STAGES)
    before: set[str] = set()
    for step in steps:
        for names, makers in NEEDS.get(step.stage, ()):
            if not before & set(makers) and not any(value_at(step.section, name) is not None for name in names):
                raise ConfigError(
                    f"{step.key}: it needs {' or '.join(names)}, and no stage before it makes one",
                    f"name it in the section, or submit a recipe with {' or '.join(makers)} before it",
                )
        for part in (step.section, *(value for value in step.section.values() if isinstance(value, Mapping))):
            if step.stage == "prepare" and "out" in part:
                raise ConfigError(f"{step.key}: a job writes into its own folder", "leave 'out' out")
        check_inputs(step, shared, Path(run["folder"]).parent)
        before.add(step.stage)
