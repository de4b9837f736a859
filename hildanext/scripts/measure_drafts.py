"""How many tokens a forward writes with a set of draft adapters, by kind of text, behind every token of it.

python hildanext/scripts/measure_drafts.py my-drafts --kinds gsm8k=DATA/gsm8k,stories=DATA/stories

Each folder holds the parent's own answers (`hildanext prepare --source parent --prompts FILE --out FOLDER`). Entry j of
`right` is the share of places at which the first j drafts are the parent's next greedy tokens; tokens per forward are
1 and the sum of them. Where a text is written, drafts follow places at which the one before was wrong more often than
others, so that decoding writes fewer (`hildanext bench exact --set bench.after=all`). Writes JSON to --out.
"""

import argparse
import json
import sys

import torch

from hildanext.core.errors import HildaError
from hildanext.core.run_dir import write_atomically
from hildanext.core.runtime import RuntimeConfig, machine
from hildanext.datasets import PackedDataset
from hildanext.losses.draft import DraftLossConfig, DraftStep
from hildanext.models.draft_checkpoint import load_drafts
from hildanext.trainer.draft_validation import DraftValidation

ROW = 512


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drafts", help="a folder of draft adapters")
    parser.add_argument("--kinds", required=True, help="NAME=FOLDER, separated by commas")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    try:
        runtime = RuntimeConfig("cpu", options.dtype, options.threads).resolve()
        drafter, _, card = load_drafts(options.drafts, runtime.dtype)
        step = DraftStep(drafter, DraftLossConfig())
        found = {}
        for pair in options.kinds.split(","):
            kind, _, folder = pair.partition("=")
            rows = PackedDataset(folder, ROW, packing="best_fit", pad_to_block=None)
            batches = [rows.batch([row]) for row in range(len(rows))]
            measured = DraftValidation(batches, drafter.places, ROW)(step, 0)
            right = [round(share, 4) for share in measured["acceptance"]]
            found[kind] = {"tokens_per_forward": 1 + sum(right), "right": right, "places": int(measured["groups"])}
            print(
                f"{kind}: {1 + sum(right):.3f} tokens per forward {right} at {measured['groups']:,} places", flush=True
            )
    except HildaError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    record = {
        "mask_positions": card.mask_positions,
        "kinds": found,
        "machine": machine(torch.device("cpu"), runtime.dtype),
    }
    if options.out:
        write_atomically(options.out, json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
