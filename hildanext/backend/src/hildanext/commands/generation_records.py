"""What `generate` leaves behind: the trace's file, and one line about speed and cost."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hildanext.core.metrics_log import to_json
from hildanext.core.run_dir import write_atomically
from hildanext.data.generation_result import GenerationResult, GenerationStats

if TYPE_CHECKING:
    from hildanext.engine.base import RequestOutput


def save_trace(path: str, machine: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows, each with its steps, beside what they were made on."""
    write_atomically(Path(path), to_json({**machine, "rows": rows}, indent=1) + "\n")
    print(f"trace: {path}", file=sys.stderr)


def stats_line(results: Sequence[GenerationResult], machine: Mapping[str, Any], batch_size: int) -> str:
    """Speed and cost of a run in this process."""
    stats = [result.stats for result in results]
    starts = range(0, len(stats), batch_size)
    seconds = sum(max(part.seconds for part in stats[at : at + batch_size]) for at in starts)
    total = type(stats[0]).total(stats)
    counts = {kind: getattr(total, f"{kind}_forwards") for kind in ("prefill", "denoise", "commit", "revise")}
    knobs = {name: "off" if value is None else value for name, value in machine["decoder"].items() if name != "name"}
    exact = _exact_parts(total, machine["decoder"])
    parts = [
        f"{total.tokens / max(seconds, 1e-9):.1f} tokens/s",
        f"{total.tokens} tokens",
        f"{total.forwards} forwards ({', '.join(f'{count} {kind}' for kind, count in counts.items() if count)})",
        f"{total.tokens_per_forward:.2f} tokens per forward",
        "" if exact else f"{total.rows_per_token:.1f} rows per token",
        *exact,
        f"{total.edits} edits",
        f"{machine['dtype']} on {machine['device']}, {machine['threads']} threads",
        "" if exact else f"block {machine['block_size']}",
        ", ".join(f"{name} {value}" for name, value in knobs.items()),
        machine["mode"],
    ]
    return "[" + "; ".join(part for part in parts if part) + "]"


def _exact_parts(total: GenerationStats, decoder: Mapping[str, Any]) -> list[str]:
    """What exact mode says besides; nothing in another mode."""
    if decoder["name"] != "exact":
        return []
    from hildanext.exact import ExactStats

    if not isinstance(total, ExactStats):  # the parent wrote alone
        return []
    share = f" ({100 * total.confirmed / total.drafted:.0f} %)" if total.drafted else ""
    return [
        f"{total.rows_per_forward:.1f} rows per forward",
        f"{total.confirmed} of {total.drafted} drafts confirmed{share}",
    ]


def remote_stats_line(outputs: "Sequence[RequestOutput]", server: Mapping[str, Any]) -> str:
    """Speed and cost of a call to a server, as seen from here; of its forwards only what it tells."""
    # A server may count more tokens than it hands over: these here are what came.
    tokens, seconds = sum(len(output.tokens) for output in outputs), max(output.seconds for output in outputs)
    total = replace(GenerationStats.total(output.stats for output in outputs), tokens=tokens)
    first = min(output.first_piece_seconds for output in outputs)
    parts = [f"{tokens / max(seconds, 1e-9):.1f} tokens/s", f"{tokens} tokens", f"first text after {first:.2f} s"]
    if total.forwards:
        parts += [f"{total.forwards} forwards", f"{total.tokens_per_forward:.2f} tokens per forward"]
        parts.append(f"{total.edits} edits")
    parts.append(f"{server['model']} at {server['server']}")
    if server["engine"] is not None:
        parts += [f"{server['dtype']} on {server['device']}", f"block {server['block_size']}", server["mode"]]
    return "[" + "; ".join(parts) + "]"
