"""Validate a run without weights: unknown keys, wrong types, names that do not exist, block sizes that do not divide.

hildanext check hildanext/runs/configs/demo.json
"""

import argparse
from pathlib import Path
from typing import Any

from hildanext.commands import add_recipe_flags, read_recipe
from hildanext.stages import STAGES


def configure(parser: argparse.ArgumentParser) -> None:
    add_recipe_flags(parser)


def run(options: argparse.Namespace) -> int:
    from hildanext.core.config import validate
    from hildanext.recipe import check, section_of
    from hildanext.serve.settings import ServeConfig

    recipe = read_recipe(options)
    steps = check(as_recipe(recipe), STAGES)
    validate(ServeConfig, section_of(recipe, "serve"), where="section serve")
    print(f"{Path(options.config).name} holds: {', '.join(step.key for step in steps)}")
    return 0


def as_recipe(run: dict[str, Any]) -> dict[str, Any]:
    """A run for a single verb has sections and no stages: the stages are then the sections it has."""
    if "stages" in run:
        return run
    return {"folder": "", **run, "stages": [{"stage": name} for name in STAGES if name in run]}
