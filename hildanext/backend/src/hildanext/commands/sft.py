"""Teach a diffusion model to answer.

hildanext sft --config hildanext/runs/configs/sft-tiny.json --out runs/sft-tiny
hildanext sft --config hildanext/runs/configs/sft-tiny.json --out runs/sft-tiny --set sft.epochs=2
"""

import argparse
import json

from hildanext.commands import add_run_flags, load_run


def configure(parser: argparse.ArgumentParser) -> None:
    add_run_flags(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="run folder; an unfinished run in it is resumed")
    parser.add_argument("--quiet", action="store_true", help="no progress display")
    parser.add_argument(
        "--data-only",
        action="store_true",
        help="render the conversations and stop; several processes then find them ready",
    )


def run(options: argparse.Namespace) -> int:
    from pathlib import Path

    from hildanext.core.runtime import is_main_process
    from hildanext.report.html import write_report
    from hildanext.sft_stage1 import prepare_data, sft

    config = load_run(options)
    sections = config.get("sft", {}), config.get("chat", {})
    if options.data_only:
        print(json.dumps(prepare_data(*sections, options.out)))
        return 0
    summary = sft(*sections, options.out, config.get("profile", "SAFE"), options.quiet)
    if is_main_process():
        outcome = {"sft_run": options.out, "sft": summary}
        report = write_report(options.out, {"sft": outcome}, config.get("name", "") or Path(options.out).name)
        print(json.dumps({**summary, "report": str(report)}))
    return 0
