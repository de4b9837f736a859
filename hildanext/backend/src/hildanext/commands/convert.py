"""Turn an autoregressive model into a diffusion model.

hildanext convert --config hildanext/runs/configs/default.json --out runs/my-conversion
accelerate launch --config_file hildanext/runs/accelerate/ddp.json -m hildanext.cli convert --config ... --out ...
"""

import argparse

from hildanext.commands import add_training_flags, load_run, report_training


def configure(parser: argparse.ArgumentParser) -> None:
    add_training_flags(parser)


def run(options: argparse.Namespace) -> int:
    from hildanext.wsd_stage0 import convert

    config = load_run(options)
    sections = config.get("convert", {}), config.get("data", {})
    summary = convert(*sections, options.out, config.get("profile", "SAFE"), options.quiet)
    return report_training(options, config, {"run": options.out}, summary)
