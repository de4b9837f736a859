"""Teach a diffusion model to answer.

hildanext sft --config hildanext/runs/configs/sft-tiny.json --out runs/sft-tiny
hildanext sft --config hildanext/runs/configs/sft-tiny.json --out runs/sft-tiny --set sft.epochs=2
"""

import argparse

from hildanext.commands import add_training_flags, open_stage, print_json, run_training


def configure(parser: argparse.ArgumentParser) -> None:
    add_training_flags(parser)
    parser.add_argument(
        "--data-only",
        action="store_true",
        help="render the conversations and stop; several processes then find them ready",
    )


def run(options: argparse.Namespace) -> int:
    section, context = open_stage(options)
    if not options.data_only:
        return run_training(options, section, context)
    from hildanext.stages.sft import render

    parts = render(section, context)
    if options.json:
        print_json(parts)
    else:
        counts = ", ".join(f"{parts[name]['examples']:,} for {name}" for name in ("train", "valid"))
        print(f"conversations in {context.stage_dir}: {counts}")
        print("next: the same command without --data-only")
    return 0
