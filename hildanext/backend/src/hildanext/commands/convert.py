"""Turn an autoregressive model into a diffusion model.

hildanext convert --config hildanext/runs/configs/default.json --out runs/my-conversion
accelerate launch --config_file hildanext/runs/accelerate/ddp.json -m hildanext.cli convert --config ... --out ...
"""

import argparse
import json

from hildanext.commands import add_run_flags, load_run


def configure(parser: argparse.ArgumentParser) -> None:
    add_run_flags(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="run folder; an unfinished run in it is resumed")
    parser.add_argument("--quiet", action="store_true", help="no progress display")


def run(options: argparse.Namespace) -> int:
    from pathlib import Path

    from hildanext.core.runtime import is_main_process
    from hildanext.report.html import write_report
    from hildanext.wsd_stage0 import convert

    config = load_run(options)
    summary = convert(
        config.get("convert", {}), config.get("data", {}), options.out, config.get("profile", "SAFE"), options.quiet
    )
    if is_main_process():
        title = config.get("name", "") or Path(options.out).name
        report = write_report(options.out, {"convert": {"run": options.out}}, title)
        print(json.dumps({**summary, "report": str(report)}))
    return 0
