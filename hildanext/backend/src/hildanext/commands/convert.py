"""Turn an autoregressive model into a diffusion model.

hildanext convert --config hildanext/runs/configs/default.json --out runs/my-conversion
accelerate launch --config_file hildanext/runs/accelerate/ddp.json -m hildanext.cli convert --config ... --out ...
"""

import argparse

from hildanext.commands import add_training_flags, open_stage, run_training


def configure(parser: argparse.ArgumentParser) -> None:
    add_training_flags(parser)


def run(options: argparse.Namespace) -> int:
    return run_training(options, *open_stage(options))
