"""What `exact_speed` measured, for people: tables, the same as Markdown, and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from hildanext.core import plots

Rows = Sequence[Sequence[str]]

COLUMNS = (
    "way", "runtime, weights", "tok/s", "x parent", "tok/forward", "rows/forward", "first ms", "= parent", "= own rows",
    "differs at", "nats", "peak MB",
)  # fmt: skip


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Every way; each kind of prompt; forwards by rows, and how far each network is from fp32."""
    shown = []
    for title, columns, rows, caption in _tables(result):
        table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number < 2 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        shown.append(table)
    return shown


def markdown(result: Mapping[str, Any]) -> str:
    """The same tables, and what they were measured on."""
    ran_on = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in ran_on["versions"].items() if version)
    parts = [f"{ran_on['device_name'] or ran_on['device']}, {ran_on['threads']} threads. {versions}.\n"]
    for title, columns, rows, caption in _tables(result):
        lines = [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]
        parts.append(f"**{title}**\n\n" + "\n".join(lines) + (f"\n\n{caption}\n" if caption else "\n"))
    return "\n".join(parts)


def draw(result: Mapping[str, Any], path: str | Path) -> Path:
    """Bars of tokens per second, each with its tokens per forward and the share of answers that are the parent's."""
    ways = list(reversed(result["ways"]))
    figure, axes = plots.new_figure(9.0, 1.2 + 0.32 * len(ways))
    networks = list(dict.fromkeys((way["runtime"], way["weights"]) for way in result["ways"]))
    for number, way in enumerate(ways):
        colour = plots.PALETTE[networks.index((way["runtime"], way["weights"])) % len(plots.PALETTE)]
        speed = way["tokens_per_second"] or 0.0
        axes.barh(number, speed, color=colour)
        per_forward = f"{way['tokens_per_forward']:.2f} a forward, " if way["tokens_per_forward"] else ""
        note = f" {speed:.1f}  ({per_forward}{100 * way['like_parent']['equal']:.0f} % the parent's text)"
        axes.text(speed, number, note, va="center", fontsize=7.5, color=plots.INK)
    axes.set_yticks(range(len(ways)), [f"{way['name']}  [{way['runtime']}, {way['weights']}]" for way in ways])
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlim(right=1.6 * max([way["tokens_per_second"] or 0.0 for way in ways], default=1.0))
    axes.set_xlabel("tokens per second behind the first, medians over answers", fontsize=9)
    figure.suptitle(_title(result), x=0.02, ha="left", fontsize=11, color=plots.INK)
    return plots.save(figure, path)


def _tables(result: Mapping[str, Any]) -> list[tuple[str, Sequence[str], Rows, str | None]]:
    ways = result["ways"]
    caption = (
        "x parent: median over answers of the rate beside the plain parent of the same runtime and weights (llama.cpp: "
        "of torch); = parent: answers that are torch's plain parent's token for token; = own rows: those of the parent "
        "in forwards of the same rows; differs at: median place of the first difference from the plain parent; nats: "
        "of the text under torch's parent"
    )
    kinds = list(result["prompts"])
    by_kind = [f"{kind}: {what}" for kind in kinds for what in ("tok/s", "x", "tok/fwd")]
    rows_fed = [str(rows) for rows in next(iter(result["forward_ms"].values()))]
    forwards = [
        [name, "", *(f"{took:.1f}" for took in times.values()), *_distance(result["distance"][name])]
        for name, times in result["forward_ms"].items()
    ]
    return [
        (_title(result), COLUMNS, [_row(way) for way in ways], caption),
        (
            "Each kind of prompt",
            ("way", "runtime, weights", *by_kind),
            [[way["name"], _network(way), *_kind_cells(way, kinds)] for way in ways],
            None,
        ),
        (
            "Milliseconds of a forward by its rows; the parent's distance from fp32 behind every token of its answers",
            ("network", "", *rows_fed, "nats - fp32", "KL", "same argmax"),
            forwards,
            "; ".join(f"blocks, {name}: {line} by mask" for name, line in result["blocks_from_fp32"].items()) or None,
        ),
    ]


def _title(result: Mapping[str, Any]) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in result["prompts"].items())
    size = f"{result['settings']['new_tokens']} tokens each, x {result['settings']['repeats']}"
    return f"{result['parent']}: {kinds}, {size}, {result['machine']['threads']} threads"


def _network(way: Mapping[str, Any]) -> str:
    return f"{way['runtime']}, {way['weights']}"


def _row(way: Mapping[str, Any]) -> list[str]:
    own, peak = way["like_own_rows"], way.get("peak_bytes")
    return [
        way["name"],
        _network(way),
        _cell(way["tokens_per_second"], ".1f"),
        _cell(way["over_parent"], ".2f"),
        _cell(way["tokens_per_forward"], ".2f"),
        _cell(way["rows_per_forward"], ".1f"),
        _cell(way["first_token_ms"], ".0f"),
        _cell(100 * way["like_parent"]["equal"], ".0f %"),
        _cell(None if own is None else 100 * own["equal"], ".0f %"),
        _cell(way["like_parent"]["first_difference"], ".0f"),
        _cell(way["nats"], ".3f"),
        _cell(None if peak is None else peak / 2**20, ".0f"),
    ]


def _kind_cells(way: Mapping[str, Any], kinds: Sequence[str]) -> list[str]:
    cells = []
    for kind in kinds:
        of_kind = way["kinds"][kind]
        cells += [_cell(of_kind["tokens_per_second"], ".1f"), _cell(of_kind["over_parent"], ".2f")]
        cells.append(_cell(of_kind["tokens_per_forward"], ".2f"))
    return cells


def _distance(distance: Mapping[str, float]) -> list[str]:
    return [f"{distance['nats']:+.4f}", f"{distance['kl']:.4f}", f"{100 * distance['argmax']:.1f} %"]


def _cell(value: float | None, shape: str) -> str:
    if value is None:
        return "-"
    number, space, unit = shape.partition(" ")
    return f"{value:{number}}{space}{unit}"
