"""Validate a run without weights: unknown keys, wrong types, names that do not exist, block sizes that do not divide.

hildanext check hildanext/runs/configs/demo.json
"""

import argparse
from pathlib import Path

from hildanext.stages import STAGES
from hildanext.verbs import add_recipe_flags, read_recipe


def configure(parser: argparse.ArgumentParser) -> None:
    add_recipe_flags(parser)


def run(options: argparse.Namespace) -> int:
    from hildanext.recipe import check

    steps = check(read_recipe(options), STAGES)
    print(f"{Path(options.config).name} holds: {', '.join(step.key for step in steps)}")
    return 0
