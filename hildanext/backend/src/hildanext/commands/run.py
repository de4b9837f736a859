"""A recipe: its stages in order, resumable.

hildanext run hildanext/runs/configs/demo.json
hildanext run hildanext/runs/configs/demo.json --set folder=/tmp/demo --set seed=1
accelerate launch --config_file hildanext/runs/accelerate/ddp.json -m hildanext.cli run ...
"""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from hildanext.commands import add_recipe_flags, read_recipe
from hildanext.core.logging_setup import configure_logging
from hildanext.stages import STAGES

if TYPE_CHECKING:
    from hildanext.recipe import Step


def configure(parser: argparse.ArgumentParser) -> None:
    add_recipe_flags(parser)


def run(options: argparse.Namespace) -> int:
    from hildanext.core.runtime import is_main_process
    from hildanext.recipe import execute

    configure_logging("info")
    recipe = read_recipe(options)
    begun = time.perf_counter()
    outcomes = execute(recipe, STAGES, _announce)
    if not is_main_process():
        return 0
    print(f"done in {time.perf_counter() - begun:.0f} s: {recipe['folder']}")
    for outcome in outcomes.values():
        if "report" in outcome:
            print(f"report: {Path(outcome['report']).resolve()}")
    return 0


def _announce(step: "Step", event: str) -> None:
    words = {"done": "was done before", "start": "starts", "finished": "is done"}
    print(f"[{step.key}] {words[event]}", flush=True)
