"""What makes drafts of a kept parent better: one change at a time, at equal steps.

python hildanext/scripts/ablate_drafts.py --train DATA/train --valid DATA/valid --plain TEXT

--train and --valid are the parent's own answers (`hildanext prepare --source parent`), --plain other text prepared for
the same tokenizer. Every run has the same steps, masks, data order and anchors; `base` is the configuration that the
others change one thing of. Interrupted, the same command goes on. Writes `ablation.json` and `ablation.md` into --out.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hildanext.core.config import merge
from hildanext.core.errors import HildaError
from hildanext.core.run_dir import write_atomically
from hildanext.core.runtime import machine, set_threads
from hildanext.drafts_stage0 import convert_kept

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "base": ("", {}),
    "rank-8": ("LoRA of rank 8", {"lora": {"rank": 8, "alpha": 16}}),
    "rank-128": ("LoRA of rank 128", {"lora": {"rank": 128, "alpha": 256}}),
    "enter-0": ("masks enter at the embedding", {"enter": 0}),
    "enter-late": ("masks enter three quarters up", {"enter": None}),
    "one-vector": ("one mask vector for all places", {"shared_place": True}),
    "ce": ("cross-entropy to the text's token", {"loss": {"kind": "ce"}}),
    "both": ("half KL, half cross-entropy", {"loss": {"kind": "both"}}),
    "no-sampler": ("no sampler head", {"sampler": None}),
    "plain": ("other text in place of the parent's answers", {}),
    "eight": ("groups of 8 masks, half as many", {"places": 8}),
    "noise": ("a third of the groups partly filled (entering at 0)", {"enter": 0, "noise": {"share": 0.33}}),
}


def main() -> int:
    options = _options()
    set_threads(options.threads)
    chosen = options.only.split(",") if options.only else list(VARIANTS)
    try:
        runs = [_run(name, options) for name in chosen]
    except HildaError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130
    _report(runs, options)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent", default="smollm2-135m")
    parser.add_argument("--train", required=True, help="prepared answers of the parent")
    parser.add_argument("--valid", required=True, help="held-out ones, that every run is measured on")
    parser.add_argument("--plain", required=True, help="prepared text of others")
    parser.add_argument("--folder", default="runs/ablate-drafts", help="where the runs go")
    parser.add_argument("--out", default="hildanext/docs/results/exact")
    parser.add_argument("--only", default="", help=f"some of {', '.join(VARIANTS)}, separated by commas")
    parser.add_argument("--masks", type=int, default=30_000)
    parser.add_argument("--groups", type=int, default=192, help="of four masks, in a row of the batch")
    parser.add_argument("--enter", type=int, default=15)
    parser.add_argument("--late", type=int, default=22, help="the layer of three quarters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def _run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one variant, or read what an earlier call measured."""
    folder = Path(options.folder) / name
    found = folder / "measured.json"
    if found.is_file():
        return dict(json.loads(found.read_text(encoding="utf-8")))
    base = {
        "places": 4, "enter": options.enter, "sampler": 512, "lora": {"rank": 32, "alpha": 64},
        "loss": {"groups": options.groups}, "mask_positions": options.masks,
    }  # fmt: skip
    drafts = merge(base, VARIANTS[name][1])
    if drafts["enter"] is None:
        drafts["enter"] = options.late
    if drafts["places"] == 8:
        drafts["loss"]["groups"] = options.groups // 2
    section = {
        "parent": options.parent, "keep_parent": True, "drafts": drafts, "valid_rows": 16, "seed": options.seed,
        "train": {
            "batch_size": 1, "learning_rate": {"peak": 2e-3, "warmup": 0.05},
            "evaluate_every": 1_000_000, "checkpoint_every": 1_000_000,
        },
    }  # fmt: skip
    train = options.plain if name == "plain" else options.train
    summary = convert_kept(section, {"train": train, "valid": options.valid, "sequence_length": 512}, folder)
    measured = {"name": name, **_measured(folder), "masks": summary["mask_positions"], "seconds": summary["seconds"]}
    write_atomically(found, json.dumps(measured, indent=1) + "\n")
    print(_line(measured), flush=True)
    return measured


def _measured(folder: Path) -> dict[str, Any]:
    """The last validation of a run."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = [line for line in map(json.loads, lines) if line["kind"] == "eval"][-1]
    return {key: last[key] for key in ("step", "tokens_per_forward", "acceptance")}


def _line(run: Mapping[str, Any]) -> str:
    right = ", ".join(f"{share:.3f}" for share in run["acceptance"])
    return f"{run['name']}: {run['tokens_per_forward']:.3f} tokens per forward ({right}), {run['seconds']:.0f} s"


def _report(runs: list[dict[str, Any]], options: argparse.Namespace) -> None:
    base = runs[0]
    rows = [
        f"| {VARIANTS[run['name']][0] or 'base'} "
        f"| {1 + sum(run['acceptance'][:4]):.3f} | {1 + sum(run['acceptance'][:2]):.3f} "
        f"| {', '.join(f'{100 * share:.1f}' for share in run['acceptance'])} |"
        for run in runs
    ]
    text = "\n".join(
        [
            f"One change at a time ({options.parent}, {options.masks:,} masks, {base['step']} steps, seed "
            f"{options.seed}: one, so that differences of a few hundredths say nothing). Base: masks enter at layer"
            f" {options.enter}, rank 32, a vector for each place, sampler head of 512, KL, the parent's own answers.",
            "",
            "| | tokens per forward, 4 drafts | 2 drafts | first j drafts right, % |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )
    settings = {key: getattr(options, key) for key in ("parent", "masks", "groups", "enter", "late", "seed", "threads")}
    record = {"settings": settings, "machine": machine(threads=options.threads), "runs": runs}
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "ablation.json", json.dumps(record, indent=1) + "\n")
    write_atomically(out / "ablation.md", text)
    print(text)


if __name__ == "__main__":
    sys.exit(main())
