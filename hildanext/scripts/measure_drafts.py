"""How many tokens a forward writes with a set of draft adapters, by kind of text, behind every token of it.

python hildanext/scripts/measure_drafts.py my-drafts --kinds gsm8k=DATA/gsm8k,stories=DATA/stories

Each folder holds the parent's own answers (`hildanext prepare --source parent --prompts FILE --out FOLDER`). Entry j of
`right` is the share of places at which the first j drafts are the parent's next greedy tokens; tokens per forward are
1 and the sum of them. Where a text is written, drafts follow places at which the one before was wrong more often than
others, so that decoding writes fewer (`hildanext bench exact --set bench.after=all`). Beside it: how many of the right
drafts are in a shortlist, and how many of the text's tokens in the drafts' vocabulary. Writes JSON to --out.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hildanext.core.errors import HildaError
from hildanext.core.run_dir import write_atomically
from hildanext.core.runtime import RuntimeConfig, machine
from hildanext.datasets import PackedDataset
from hildanext.losses.draft import DraftLossConfig, DraftStep
from hildanext.models.draft_checkpoint import load_drafts
from hildanext.trainer.draft_validation import DraftValidation

ROW = 512
SHORTLISTS = (32, 64)


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
        found = {kind: _measured(step, kind, Path(folder)) for kind, folder in _kinds(options.kinds)}
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


def _kinds(text: str) -> list[tuple[str, str]]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    return [(kind, folder) for kind, _, folder in pairs]


def _measured(step: DraftStep, kind: str, folder: Path) -> dict[str, Any]:
    rows = PackedDataset(folder, ROW, packing="best_fit", pad_to_block=None)
    validation = DraftValidation([rows.batch([row]) for row in range(len(rows))], step.model.places, ROW)
    measured = validation(step, 0)
    right = [round(share, 4) for share in measured["acceptance"]]
    found = {
        "tokens_per_forward": 1 + sum(right), "right": right, "places": int(measured["groups"]),
        **_shortlisted(step, validation), "tokens_in_vocabulary": _known(step, rows),
    }  # fmt: skip
    print(f"{kind}: {found['tokens_per_forward']:.3f} tokens per forward", json.dumps(found), flush=True)
    return found


@torch.no_grad()
def _shortlisted(step: DraftStep, validation: DraftValidation) -> dict[str, float]:
    """Of the right drafts: the share that is among the likeliest so many before its place is told anything."""
    model, kept, count = step.model, dict.fromkeys(SHORTLISTS, 0), 0
    sampler = model.sampler
    for view, groups in zip(validation.views, validation.groups, strict=True):
        learnt = groups.learnt.flatten().nonzero()[:, 0]
        told, clean = (part[learnt] for part in step.read(view, groups))
        model.sampler = None
        untold = step.read(view, groups)[0][learnt]
        model.sampler = sampler
        for at in range(0, len(learnt), step.chunk):
            piece = slice(at, at + step.chunk)
            drafts = model.most_probable(model.logits(told[piece]))
            good = drafts == model.logits(clean[piece]).argmax(-1)
            ids, _ = model.shortlist(untold[piece], max(SHORTLISTS))
            count += int(good.sum())
            for size in SHORTLISTS:
                kept[size] += int(((ids[:, :size] == drafts[:, None]).any(-1) & good).sum())
    return {f"right_in_{size}": round(found / max(count, 1), 4) for size, found in kept.items()}


def _known(step: DraftStep, rows: PackedDataset) -> float:
    """The share of tokens that drafts may say."""
    chosen = step.model.draft_tokens
    if chosen is None:
        return 1.0
    tokens = np.concatenate(list(rows.documents()))
    return round(float(np.isin(tokens, chosen.numpy()).mean()), 4)


if __name__ == "__main__":
    sys.exit(main())
