"""Align a diffusion model by reinforcement learning on a reward that can be checked.

hildanext rl --config hildanext/runs/configs/rl-tiny.json --out runs/rl-tiny
hildanext rl --config hildanext/runs/configs/rl-tiny.json --out runs/rl-tiny --set rl.rounds=20
"""

import argparse

from hildanext.commands import add_training_flags, open_stage, run_training


def configure(parser: argparse.ArgumentParser) -> None:
    add_training_flags(parser)


def run(options: argparse.Namespace) -> int:
    section, context = open_stage(options)
    return run_training(options, section, context)
