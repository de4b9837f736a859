"""What `frontier` measured, for people: tables, the same as Markdown, and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from hildanext.bench.acceleration.sweeps import BASE
from hildanext.bench.rl.sheets import Sheet, cell, document
from hildanext.core import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = (
    "setting", "tok/forward", "x base", "nats", "nats - base", "rows/token", "tok/s", "x parent", "distinct 2",
    "repeats", "denoise", "commit", "edits",
)  # fmt: skip


def tables(result: Mapping[str, Any]) -> list[Table]:
    return [sheet.table() for sheet in _sheets(result)]


def markdown(result: Mapping[str, Any]) -> str:
    return document(_sheets(result), result["machine"], f"Model: `{result['model']}`.")


def draw(result: Mapping[str, Any], path: str | Path) -> Path:
    """Nats per token against tokens per forward and against tokens per second; the parent, which writes one a
    forward, is in the second alone."""
    rows = [row for row in result["rows"] if row["decoder"] is not None]
    figure, grid = plots.new_grid(1, 2, 13.0, 5.2)
    points(grid[0][0], rows, lambda row: row["tokens_per_forward"]["value"], "tokens per forward")
    points(grid[0][1], result["rows"], lambda row: row["tokens_per_second"], "tokens per second")
    for axes in grid[0]:
        axes.legend(fontsize=7, ncols=2)
    figure.suptitle(f"{result['model']}: {_asked(result)}", x=0.02, ha="left", fontsize=11, color=plots.INK)
    return plots.save(figure, path)


def points(axes: "Axes", rows: Sequence[Mapping[str, Any]], place: Any, label: str) -> None:
    """Nats over `place`, a colour for each family of settings (what stands before the first number or comma)."""
    families: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        families.setdefault(family(row["name"]), []).append(row)
    marks = "osD^v<>Ph*"
    for number, (name, own) in enumerate(families.items()):
        axes.plot(
            [place(row) for row in own],
            [row["nats"]["value"] for row in own],
            marker=marks[number % len(marks)],
            linestyle="none",
            markersize=5,
            alpha=0.85,
            color=plots.PALETTE[number % len(plots.PALETTE)],
            label=name,
        )
    axes.set_xlabel(label, fontsize=9)
    axes.set_ylabel("nats per token under the parent", fontsize=9)


def family(name: str) -> str:
    """Of a setting's name its sweep and its fallback, without the value."""
    words = [word for word in name.replace(",", " ,").split() if not word.replace(".", "", 1).isdigit()]
    return " ".join(words).replace(" ,", ",")


def interval(shown: Mapping[str, Any] | None, shape: str = ".2f") -> str:
    """A value with its interval, or a dash."""
    if shown is None:
        return "-"
    return f"{cell(shown['value'], shape)} ({cell(shown['low'], shape)}, {cell(shown['high'], shape)})"


def row_cells(row: Mapping[str, Any], base: Mapping[str, Any] | None) -> list[str]:
    """A row of `COLUMNS`."""
    per_forward = row["tokens_per_forward"]
    ratio = per_forward["value"] / base["tokens_per_forward"]["value"] if base is not None else None
    return [
        row["name"],
        interval(per_forward),
        cell(ratio),
        interval(row["nats"]),
        interval(row["nats"].get("over")) if base is not None else "-",
        cell(row["rows_per_token"]["value"] if row["rows_per_token"] is not None else None),
        cell(row["tokens_per_second"], ".1f"),
        cell(row["over_parent"]),
        cell(row["distinct_2"]),
        cell(row["repetition"], ".3f"),
        str(row["denoise_forwards"]),
        str(row["commit_forwards"]),
        str(row["edits"]),
    ]


CAPTION = (
    "Brackets: 95 %, bootstrap over prompts (and seeds where there are several). tok/forward: all forwards but the "
    "prompt's; base: {base}; rows/token: rows fed, but for the prompt's whole blocks; tok/s: median over turns; "
    "x parent: median over turns of "
    "tokens/s beside the parent's in the same turn; nats: of what was written, per token, under the parent"
)


def _sheets(result: Mapping[str, Any]) -> list[Sheet]:
    rows = result["rows"]
    base = next(row for row in rows if row["name"] == BASE)
    sheets = [
        Sheet(
            f"Frontier: {_asked(result)}", COLUMNS, [row_cells(row, base) for row in rows], CAPTION.format(base=BASE)
        ),
        Sheet("Most tokens per forward at the nats of a base, or fewer", ("base", "setting"), _best(result)),
    ]
    if result["overhead"] is not None:
        sheets.append(_overhead(result["overhead"]))
    return sheets


def _best(result: Mapping[str, Any]) -> list[list[str]]:
    named = {row["name"]: row for row in result["rows"]}
    shown = []
    for base, name in result["best"].items():
        if name is None:
            continue
        row, of_base = named[name], named[base]
        more = row["tokens_per_forward"]["value"] / of_base["tokens_per_forward"]["value"]
        nats = f"{row['nats']['value']:.2f} nats beside {of_base['nats']['value']:.2f}"
        shown.append([base, f"{name}: {more:.2f} times its tokens per forward, {nats}"])
    return shown


def _overhead(overhead: Mapping[str, Any]) -> Sheet:
    rows = [[name, f"{rule['ms']:.3f}", f"{100 * rule['share']:+.1f} %"] for name, rule in overhead["rules"].items()]
    caption = f"Medians over {overhead['steps']} steps, whose forward takes {overhead['forward_ms']:.2f} ms"
    return Sheet("What a rule costs beside the threshold's", ("rule", "ms", "of a step"), rows, caption)


def _asked(result: Mapping[str, Any]) -> str:
    settings = result["settings"]
    return (
        f"{len(result['prompt_tokens'])} prompts x {settings['new_tokens']} tokens, "
        f"block {result['card']['block_size']}, {result['machine']['threads']} threads"
    )
