"""What `generate` leaves behind: the trace's file, and one line about speed and cost."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hildanext.core.run_dir import write_atomically

if TYPE_CHECKING:
    from hildanext.data.generation_result import GenerationResult
    from hildanext.engine.base import RequestOutput


def save_trace(path: str, machine: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows, each with its steps, beside what they were made on."""
    write_atomically(Path(path), json.dumps({**machine, "rows": rows}, indent=1) + "\n")
    print(f"trace: {path}", file=sys.stderr)


def stats_line(results: "Sequence[GenerationResult]", machine: Mapping[str, Any], batch_size: int) -> str:
    """Speed and cost of a run in this process."""
    stats = [result.stats for result in results]
    starts = range(0, len(stats), batch_size)
    seconds = sum(max(part.seconds for part in stats[at : at + batch_size]) for at in starts)
    kinds = ("prefill", "denoise", "commit", "revise")
    counts = {kind: sum(getattr(part, f"{kind}_forwards") for part in stats) for kind in kinds}
    tokens, forwards = sum(part.tokens for part in stats), sum(counts.values())
    knobs = {name: "off" if value is None else value for name, value in machine["decoder"].items() if name != "name"}
    parts = [
        f"{tokens / max(seconds, 1e-9):.1f} tokens/s",
        f"{tokens} tokens",
        f"{forwards} forwards ({', '.join(f'{count} {kind}' for kind, count in counts.items() if count)})",
        f"{tokens / max(forwards - counts['prefill'], 1):.2f} tokens per forward",
        f"{sum(part.edits for part in stats)} edits",
        f"{machine['dtype']} on {machine['device']}, {machine['threads']} threads",
        f"block {machine['block_size']}",
        ", ".join(f"{name} {value}" for name, value in knobs.items()),
        machine["mode"],
    ]
    return "[" + "; ".join(parts) + "]"


def remote_stats_line(outputs: "Sequence[RequestOutput]", server: Mapping[str, Any]) -> str:
    """Speed and cost of a call to a server, as seen from here; of its forwards only what it tells."""
    stats = [output.stats for output in outputs]
    tokens, seconds = sum(len(output.tokens) for output in outputs), max(output.seconds for output in outputs)
    forwards, first = sum(part.forwards for part in stats), min(output.first_piece_seconds for output in outputs)
    parts = [f"{tokens / max(seconds, 1e-9):.1f} tokens/s", f"{tokens} tokens", f"first text after {first:.2f} s"]
    if forwards:
        paid = forwards - sum(part.prefill_forwards for part in stats)
        parts += [f"{forwards} forwards", f"{tokens / max(paid, 1):.2f} tokens per forward"]
        parts.append(f"{sum(part.edits for part in stats)} edits")
    parts.append(f"{server['model']} at {server['server']}")
    if server["engine"] is not None:
        parts += [f"{server['dtype']} on {server['device']}", f"block {server['block_size']}", server["mode"]]
    return "[" + "; ".join(parts) + "]"
