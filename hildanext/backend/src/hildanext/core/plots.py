"""Pictures of a run: training curves with the phases shaded, curves of several runs side by side, evaluation bars.

Matplotlib is imported when a picture is drawn, without a display and without global state. Metrics are the
lines of `metrics.jsonl`; a line that lacks a field is left out of the picture, never drawn as zero.
"""

import base64
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hildanext.core.run_dir import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Metrics = Sequence[Mapping[str, Any]]

INK, GRID = "#2b2f36", "#d9dde3"
PALETTE = ("#2a6fbb", "#d9732b", "#3a9a5b", "#8a5cc2", "#c2447c", "#7a6a2f", "#3aa0a8", "#6b7280")
HELD_OUT = ("#d9732b", "#3a9a5b", "#c2447c", "#3aa0a8", "#7a6a2f")
SHADES = {"warmup": "#fbe9c6", "stable": "#d9e8f8", "decay": "#dcefdc"}
LOSS_NAMES = {
    "m2t": "M2T: fill masks",
    "t2t": "T2T: mend and keep",
    "keep": "keep right tokens",
    "kl": "KL to the parent",
    "ar": "autoregressive",
}


def new_figure(width: float = 8.0, height: float = 3.6) -> tuple["Figure", "Axes"]:
    """An empty figure with one pair of axes in the house style."""
    figure, grid = new_grid(1, 1, width, height)
    return figure, grid[0][0]


def new_grid(rows: int, columns: int, width: float, height: float) -> tuple["Figure", "list[list[Axes]]"]:
    """An empty figure with rows of axes in the house style; those of a column share their horizontal axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, sharex="col", squeeze=False).tolist()
    for axes in (one for row in grid for one in row):
        _style(axes)
    return figure, grid


def save(figure: "Figure", path: str | Path) -> Path:
    """Write a PNG, making its folder. Raises as `write_atomically`."""
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=120, facecolor="white")
    write_atomically(path, picture.getvalue())
    return Path(path)


def data_uri(path: str | Path) -> str:
    """A PNG as text that a page can hold inline."""
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode("ascii")


def loss_figure(metrics: Metrics) -> "Figure | None":
    """Training loss with the phases shaded and the block size as steps; bounds on held-out text as points."""
    lines = _training(metrics, "loss")
    if not lines:
        return None
    figure, axes = new_figure(height=4.0)
    shade_phases(axes, metrics)
    tokens, loss = column(lines, "tokens"), column(lines, "loss")
    axes.plot(tokens, loss, color=PALETTE[0], alpha=0.22, linewidth=0.8)
    axes.plot(tokens, smoothed(loss), color=PALETTE[0], linewidth=1.8, label="training loss (smoothed)")
    _held_out(axes, metrics)
    _limit(axes, loss + column(of_kind(metrics, "eval", "bound"), "bound"))
    axes.set_ylabel("nats per maskable token")
    _block_steps(axes, lines)
    finish(figure, axes, "Training loss")
    return figure


def parts_figure(metrics: Metrics) -> "Figure | None":
    """Each part of the loss over the run; parts have their own weights and are not comparable in height."""
    lines = _training(metrics, "losses")
    names = sorted({name for line in lines for name in line["losses"]})
    if not names or any("accuracy_by_place" in line for line in lines):  # those of places are in `drafts_figure`
        return None
    figure, axes = new_figure()
    shade_phases(axes, metrics)
    everything: list[float] = []
    for colour, name in zip(_colours(), names, strict=False):
        present = [line for line in lines if line["losses"].get(name) is not None]
        values = [float(line["losses"][name]) for line in present]
        axes.plot(column(present, "tokens"), smoothed(values), color=colour, label=LOSS_NAMES.get(name, name))
        everything += smoothed(values)
    _limit(axes, everything)
    axes.set_ylabel("nats per maskable token")
    finish(figure, axes, "Parts of the loss (weighted, smoothed)")
    return figure


def drafts_figure(metrics: Metrics) -> "Figure | None":
    """The loss of each place of a group, and below it the tokens that a forward gives on held-out text."""
    lines, measured = _training(metrics, "accuracy_by_place"), of_kind(metrics, "eval", "tokens_per_forward")
    if not lines:
        return None
    figure, ((above,), (below,)) = new_grid(2, 1, 8.0, 5.2)
    names = sorted({name for line in lines for name in line["losses"]})
    for colour, name in zip(_colours(), names, strict=False):
        present = [line for line in lines if line["losses"].get(name) is not None]
        values = smoothed([float(line["losses"][name]) for line in present])
        label = name.replace("place_", "place ")
        above.plot(column(present, "mask_positions"), values, color=colour, label=label)
    above.set_ylabel("nats per mask")
    masks, gains = column(measured, "mask_positions"), column(measured, "tokens_per_forward")
    below.plot(masks, gains, color=INK, marker="o", markersize=4, label="tokens per forward, held out")
    below.set_ylabel("tokens per forward, greedy")
    finish(figure, below, "", "masks learnt from")
    above.set_title("Drafts by their place (smoothed), and what they give", loc="left", fontsize=11, color=INK)
    above.legend(fontsize=8.5, frameon=False, ncols=4)
    return figure


def accuracy_figure(metrics: Metrics) -> "Figure | None":
    """Share of masked tokens predicted right, by noise level."""
    lines = _training(metrics, "accuracy_by_t")
    buckets = sorted({bucket for line in lines for bucket in line["accuracy_by_t"]})
    if not buckets:
        return None
    figure, axes = new_figure()
    shade_phases(axes, metrics)
    shades = ("#9cc4ec", "#5b9bd8", "#2a6fbb", "#123f73")
    for index, bucket in enumerate(buckets):
        present = [line for line in lines if line["accuracy_by_t"].get(bucket) is not None]
        values = [100 * float(line["accuracy_by_t"][bucket]) for line in present]
        axes.plot(column(present, "tokens"), smoothed(values), color=shades[index % 4], label=f"t in {bucket}")
    axes.set_ylim(bottom=0)
    _headroom(axes)
    axes.set_ylabel("% of masked tokens right")
    finish(figure, axes, "Masked accuracy by noise level (smoothed)")
    return figure


def held_out_figure(metrics: Metrics) -> "Figure | None":
    """Shares measured on held-out rows: masks filled right, wrong tokens mended, right ones left alone."""
    shares = {"masked_accuracy": "masks filled right", "corrected": "wrong tokens mended", "kept": "right tokens kept"}
    if not of_kind(metrics, "eval", "corrected"):
        return None
    figure, axes = new_figure()
    for colour, (field, label) in zip(_colours(), shares.items(), strict=False):
        lines = of_kind(metrics, "eval", field)
        values = [100 * value for value in column(lines, field)]
        axes.plot(column(lines, "tokens"), values, color=colour, marker="o", markersize=4, label=label)
    axes.set_ylim(bottom=0)
    _headroom(axes)
    axes.set_ylabel("% on held-out rows")
    finish(figure, axes, "What was learned, on held-out rows")
    return figure


def curve_figure(
    metrics: Metrics, field: str, label: str, smooth: bool = True, from_zero: bool = False
) -> "Figure | None":
    """One number of the training lines over its tokens."""
    lines = _training(metrics, field)
    if not lines:
        return None
    figure, axes = new_figure(height=2.8)
    shade_phases(axes, metrics)
    values = column(lines, field)
    axes.plot(column(lines, "tokens"), smoothed(values) if smooth else values, color=PALETTE[0])
    if from_zero:
        axes.set_ylim(bottom=0)
    _headroom(axes)
    axes.set_ylabel(label)
    finish(figure, axes, label[0].upper() + label[1:])
    return figure


def comparison_figure(
    runs: Mapping[str, Metrics],
    field: str = "bound",
    label: str = "nats per token",
    title: str = "",
    levels: Mapping[str, float] | None = None,
) -> "Figure":
    """One field of several runs over data tokens. `bound` comes from eval lines, with its standard error.

    `levels` are horizontal lines (the parent, the entropy of the data).
    """
    figure, axes = new_figure(height=4.2)
    everything: list[float] = []
    for index, (name, metrics) in enumerate(runs.items()):
        colour = PALETTE[index % len(PALETTE)]
        if field == "bound":
            everything += _bound_curves(axes, name, of_kind(metrics, "eval", field), colour)
        else:
            lines = _training(metrics, field)
            axes.plot(column(lines, "tokens"), smoothed(column(lines, field)), color=colour, label=name)
            everything += column(lines, field)
    for index, (name, level) in enumerate((levels or {}).items()):
        style = ("--", ":", "-.")[index % 3]
        axes.axhline(level, color=INK, linestyle=style, linewidth=1.2, label=f"{name}: {level:.2f}")
        everything.append(level)
    _limit(axes, everything)
    axes.set_ylabel(label)
    finish(figure, axes, title or f"{field} of {len(runs)} runs")
    return figure


def _bound_curves(axes: "Axes", name: str, lines: Metrics, colour: str) -> list[float]:
    """A curve for each block size that was evaluated; bounds at different block sizes are different numbers."""
    sizes = sorted({int(line["block_size"]) for line in lines})
    for index, size in enumerate(sizes):
        here = [line for line in lines if int(line["block_size"]) == size]
        axes.errorbar(
            column(here, "tokens"),
            column(here, "bound"),
            yerr=[float(line.get("bound_se") or 0.0) for line in here],
            color=colour,
            linestyle=("-", "--", ":", "-.")[index % 4],
            marker="o",
            markersize=4,
            capsize=2,
            label=f"{name}, block {size}",
        )
    return column(lines, "bound")


def bars_figure(
    groups: Mapping[str, float], label: str, title: str, errors: Mapping[str, float] | None = None
) -> "Figure":
    """Horizontal bars with their values written beside them."""
    figure, axes = new_figure(height=0.9 + 0.42 * max(len(groups), 2))
    names, values = list(groups), list(groups.values())
    spread = [error if (error := float((errors or {}).get(name) or 0.0)) > 0 else 0.0 for name in names]  # NaN: none
    colours = [PALETTE[index % len(PALETTE)] for index in range(len(names))]
    whiskers = {"ecolor": INK, "capsize": 3}
    shown = [error if error > 0 else float("nan") for error in spread]
    axes.barh(range(len(names)), values, xerr=shown, color=colours, height=0.66, error_kw=whiskers)
    widest = max([value + error for value, error in zip(values, spread, strict=True)], default=1.0)
    for row, (value, error) in enumerate(zip(values, spread, strict=True)):
        text = f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
        text += f" ± {error:.2f}" if error else ""
        axes.text(value + error + 0.012 * widest, row, text, va="center", color=INK, fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * widest if widest > 0 else 1.0)
    axes.set_xlabel(label)
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.grid(axis="y", visible=False)
    return figure


def shade_phases(axes: "Axes", metrics: Metrics) -> None:
    """Warm-up, stable and decay as coloured grounds with their names on top."""
    for start, end, phase in phase_spans(metrics):
        axes.axvspan(start, end, color=SHADES.get(phase, "#eeeeee"), alpha=0.75, linewidth=0, zorder=0)
        words: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": 8.5, "color": "#5b6470"}
        axes.text((start + end) / 2, 0.985, phase, transform=axes.get_xaxis_transform(), **words)


def phase_spans(metrics: Metrics) -> list[tuple[float, float, str]]:
    """(first token, last token, phase) of each stretch, touching one another without gaps."""
    spans: list[tuple[float, float, str]] = []
    previous = 0.0
    for line in _training(metrics, "phase"):
        tokens, phase = float(line["tokens"]), str(line["phase"])
        if spans and spans[-1][2] == phase:
            spans[-1] = (spans[-1][0], tokens, phase)
        else:
            spans.append((previous, tokens, phase))
        previous = tokens
    return spans


def smoothed(values: Sequence[float], share: float = 0.04) -> list[float]:
    """Centred running mean over `share` of the points (at least 1); the ends use what there is."""
    half = int(len(values) * share / 2)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + float(value))
    result = []
    for index in range(len(values)):
        reach = min(half, index, len(values) - 1 - index)
        low, high = index - reach, index + reach + 1
        result.append((sums[high] - sums[low]) / (high - low))
    return result


def _held_out(axes: "Axes", metrics: Metrics) -> None:
    lines = of_kind(metrics, "eval", "bound")
    sizes = sorted({int(line["block_size"]) for line in lines})
    for index, size in enumerate(sizes):
        here = [line for line in lines if int(line["block_size"]) == size]
        errors = [float(line.get("bound_se") or 0.0) for line in here]
        axes.errorbar(
            column(here, "tokens"),
            column(here, "bound"),
            yerr=errors,
            color=HELD_OUT[index % len(HELD_OUT)],
            marker="o",
            markersize=4,
            linewidth=1,
            capsize=2,
            label=f"held out, block {size}",
        )


def _block_steps(axes: "Axes", lines: Metrics) -> None:
    sized = [line for line in lines if line.get("block_size")]
    if not sized:
        return
    twin = axes.twinx()
    twin.step(
        column(sized, "tokens"), column(sized, "block_size"), where="pre", color="#8a5cc2", linewidth=1.3, alpha=0.8
    )
    twin.set_yscale("log", base=2)
    sizes = sorted({int(line["block_size"]) for line in sized})
    twin.set_yticks(sizes, [str(size) for size in sizes])
    twin.minorticks_off()
    twin.set_ylim(min(sizes) / 1.6, max(sizes) * 2.6)
    twin.set_ylabel("block size", color="#8a5cc2")
    twin.tick_params(colors="#8a5cc2", labelsize=8.5)
    for side in ("top", "left", "bottom", "right"):
        twin.spines[side].set_visible(False)


def _style(axes: "Axes") -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8.5)


def finish(figure: "Figure", axes: "Axes", title: str, over: str = "data tokens") -> None:
    """Title, horizontal axis and legend of a figure whose curves are drawn."""
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(over)
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = min(len(handles), 4)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8.5, frameon=False)


def _limit(axes: "Axes", values: Sequence[float]) -> None:
    """Let the first steps of an untrained mask token run off the top rather than flatten everything else."""
    finite = sorted(value for value in values if value == value and abs(value) != float("inf"))
    if not finite:
        return
    top = finite[min(len(finite) - 1, int(0.985 * len(finite)))]
    low, high = finite[0], max(top, finite[0] + 1e-6)
    axes.set_ylim(max(0.0, low - 0.08 * (high - low)), high + 0.16 * (high - low))


def _headroom(axes: "Axes") -> None:
    """Room on top for the names of the phases."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.12 * (high - low))


def _short(value: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _colours() -> list[str]:
    return list(PALETTE) * 2


def of_kind(metrics: Metrics, kind: str, field: str) -> list[Mapping[str, Any]]:
    """Lines of a kind that have the field, and tokens to stand over."""
    return [line for line in metrics if line.get("kind") == kind and line.get(field) is not None and "tokens" in line]


def _training(metrics: Metrics, field: str) -> list[Mapping[str, Any]]:
    return of_kind(metrics, "train", field)


def column(lines: Metrics, field: str) -> list[float]:
    """One number of each line."""
    return [float(line[field]) for line in lines]
