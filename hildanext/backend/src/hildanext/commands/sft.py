"""Teach a diffusion model to answer.

hildanext sft --config hildanext/runs/configs/sft-tiny.json --out runs/sft-tiny
hildanext sft --config hildanext/runs/configs/sft-tiny.json --out runs/sft-tiny --set sft.epochs=2
"""

import argparse
import json

from hildanext.commands import add_training_flags, load_run, report_training


def configure(parser: argparse.ArgumentParser) -> None:
    add_training_flags(parser)
    parser.add_argument(
        "--data-only",
        action="store_true",
        help="render the conversations and stop; several processes then find them ready",
    )


def run(options: argparse.Namespace) -> int:
    from hildanext.sft_stage1 import prepare_data, sft

    config = load_run(options)
    sections = config.get("sft", {}), config.get("chat", {})
    if options.data_only:
        print(json.dumps(prepare_data(*sections, options.out)))
        return 0
    summary = sft(*sections, options.out, config.get("profile", "SAFE"), options.quiet)
    return report_training(options, config, {"sft_run": options.out, "sft": summary}, summary)
