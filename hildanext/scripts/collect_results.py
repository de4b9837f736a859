"""Collect finished conversions into one small folder: a table, the curves, the configurations.

python hildanext/scripts/collect_results.py --out hildanext/docs/results/smollm2 runs/block runs/parent

Each run folder is one that `hildanext convert --out` made; where it holds `eval/eval.json`, as
`hildanext eval --out RUN/eval` leaves it, its figures join the table. Runs that the folder holds already stay,
unless one of the same name is given or --anew is.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from hildanext.core.errors import HildaError
from hildanext.core.metrics_log import run_metrics
from hildanext.core.plots import comparison_figure, save
from hildanext.core.training_plots import training_plots


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--title", default="held-out bound at block 32, SmolLM2-135M on TinyStories")
    parser.add_argument("--curve-of", type=Path, help="a run whose training plots are copied as well")
    parser.add_argument("--anew", action="store_true", help="forget the runs collected before")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    record = options.out / "comparison.json"
    fresh = [_row(run, run_metrics(run)) for run in options.runs]
    earlier = json.loads(record.read_text(encoding="utf-8")) if record.is_file() and not options.anew else []
    names = {row["run"] for row in fresh}
    rows = [row for row in earlier if row["run"] not in names] + fresh
    save(comparison_figure({row["run"]: _curve(row) for row in rows}, title=options.title), record.with_suffix(".png"))
    record.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    record.with_suffix(".md").write_text(_table(rows), encoding="utf-8")
    if options.curve_of is not None:
        training_plots(run_metrics(options.curve_of), options.out / options.curve_of.name)
    return 0


def _row(run: Path, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """What a run did and where it ended. Raises `HildaError` where it is not a run's folder."""
    steps = [line for line in metrics if line["kind"] == "train"]
    bounds = [line for line in metrics if line["kind"] == "eval"]
    if not steps or not bounds:
        raise HildaError(f"{run} holds no finished conversion", "name folders made by hildanext convert --out")
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    convert = record["config"]["convert"]
    convert["parent"] = Path(convert["parent"]).name  # a folder's place is nobody's business
    evaluated = run / "eval" / "eval.json"
    return {
        "run": run.name,
        "tokens": steps[-1]["tokens"],
        "steps": steps[-1]["step"],
        "training_seconds": round(sum(line["seconds"] for line in steps)),
        "curve": [[line["tokens"], round(line["bound"], 4), round(line["bound_se"], 4)] for line in bounds],
        "machine": record.get("machine", {}),
        "convert": convert,
        "eval": _evaluated(evaluated) if evaluated.is_file() else None,
    }


def _curve(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A recorded curve as the metric lines it came from."""
    size = row["convert"]["block_size"]
    return [
        {"kind": "eval", "block_size": size, "tokens": tokens, "bound": bound, "bound_se": error}
        for tokens, bound, error in row["curve"]
    ]


def _evaluated(path: Path) -> dict[str, Any]:
    """The figures of an evaluation and how they were taken, without the places they were taken from."""
    found = json.loads(path.read_text(encoding="utf-8"))
    kept = {"rows": found["settings"]["rows"], **found["settings"]["likelihood"], "machine": found["machine"]}
    return {**kept, **{key: found[key] for key in ("likelihood", "generation") if found.get(key)}}


def _table(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(line["name"] for row in rows for line in (row["eval"] or {}).get("likelihood", [])))
    head = ["run", "data tokens", "steps", *names, "held out while training"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        figures = {line["name"]: line for line in (row["eval"] or {}).get("likelihood", [])}
        cells = [row["run"], f"{row['tokens']:,}", str(row["steps"])]
        for name in names:
            line = figures.get(name)
            error = f" ± {line['se']:.2f}" if line and line["kind"] == "bound" else ""
            cells.append(f"{line['nats_per_token']:.2f}{error}" if line else "")
        cells.append(" / ".join(f"{bound:.2f}" for _, bound, _ in row["curve"]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
