"""The tasks' numbers in words: one table for a terminal, and under it what each score was measured with."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from hildanext.eval.summary import LENGTH_EDGES

COLUMNS = ("task", "metric", "", "score (95 %)", "over parent (95 %)", "p", "tokens/s", "forwards", "tok/forward")


def table(result: Mapping[str, Any]) -> Table:
    """Everything in one table for a terminal; what a method was is under it (`lines`)."""
    whole = Table(title="Tasks", title_justify="left")
    for number, column in enumerate(COLUMNS):
        whole.add_column(column, justify="left" if number < 3 else "right", overflow="fold")
    for task in result["tasks"]:
        for cells in cells_of(task):
            whole.add_row(*cells)
        whole.add_section()
    return whole


def cells_of(task: Mapping[str, Any]) -> list[list[str]]:
    """The table's rows of one task: metric by metric, method by method."""
    rows = []
    for number, metric in enumerate(task["ways"][0]["scores"]):
        for place, method in enumerate(task["ways"]):
            score, cost = method["scores"][metric], method["cost"]
            over = score.get("over_parent")
            costs = [""] * 3
            if number == 0:
                per = f"{cost['tokens_per_forward']:.2f}" if "tokens_per_forward" in cost else ""
                costs = [f"{cost['tokens_per_second']:.1f}", str(cost["forwards"]), per]
            rows.append(
                [
                    f"{task['key']} ({score['items']})" if place == number == 0 else "",
                    metric if place == 0 else "",
                    method["name"],
                    _with_range(score, score["percent"]),
                    "" if over is None else _with_range(over, score["percent"], sign="+"),
                    "" if over is None or "p" not in over else _p(over["p"]),
                    *costs,
                ]
            )
    return rows


def lines(result: Mapping[str, Any]) -> list[str]:
    """What each score was measured with, and how long answers were; then the notes."""
    texts = []
    for task in result["tasks"]:
        for method in task["ways"]:
            facts = {**method["settings"], **_short(task["knobs"]), **task["facts"], **method["details"]}
            measured = ", ".join(f"{name} {_plain(value)}" for name, value in facts.items())
            cost = f"{method['cost']['tokens']} tokens in {method['cost']['seconds']:.1f} s"
            texts.append(f"{task['key']}, {method['name']}: {measured}; {_sessions(method['sessions'])}; {cost}")
            if "lengths" in method["cost"]:
                texts.append(f"    {_lengths(method['cost'])}")
    return [*texts, *result["notes"]]


def _with_range(score: Mapping[str, Any], percent: bool, sign: str = "") -> str:
    """`62.1 % (59.4 to 64.7)`, and what must be said about it."""
    value, low, high = (_number(score[key], percent, sign) for key in ("value", "low", "high"))
    shown = f"{value}{' %' if percent and value else ''} ({low} to {high})" if low and high else value
    return ", ".join(part for part in (shown, score.get("note", "")) if part)


def _number(value: float | None, percent: bool, sign: str) -> str:
    if value is None or value != value:
        return ""
    if percent:
        return f"{100 * value:{sign}.1f}"
    return (
        f"{value:{sign}.3f}" if abs(value) < 100 else f"{value:{sign}.1f}" if abs(value) < 1e4 else f"{value:{sign}.3g}"
    )


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _short(config: Mapping[str, Any]) -> dict[str, Any]:
    """Knobs that change an answer: not where the data lie, and nothing that is off (no examples is told)."""
    hidden = ("data", "split", "few_shot_data", "few_shot_seed", "block_sizes", "draws", "overlong")
    off = {"repeats": 1, "temperature": 0.0}
    return {
        name: value
        for name, value in config.items()
        if name not in hidden and value is not None and value is not False and off.get(name) != value
    }


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(str(item) if name == "name" else f"{name} {item}" for name, item in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _sessions(sessions: Sequence[Mapping[str, Any]]) -> str:
    return " + ".join(
        f"{each['device_name'] or each['device']}, {each['dtype']}, {each['threads']} threads, "
        f"batch {each['batch_size']}"
        for each in sessions
    )


def _lengths(cost: Mapping[str, Any]) -> str:
    """`answers by length in tokens: 32-63 ▂12 64-127 █52; ended by eos 60, length 4; 0 mask tokens`."""
    counts = {int(edge): count for edge, count in cost["lengths"].items() if count}
    most = max(counts.values(), default=1)
    bars = []
    for edge, count in counts.items():
        end = next((other for other in LENGTH_EDGES if other > edge), None)
        name = str(edge) if end == edge + 1 else f"{edge}-{end - 1}" if end is not None else f"{edge}+"
        bars.append(f"{name} {'▁▂▃▄▅▆▇█'[(count * 8 - 1) // most if most else 0]}{count}")
    ends = ", ".join(f"{reason} {count}" for reason, count in cost["finish_reasons"].items())
    unjudged = f"; {cost['unjudged']} not judged" if cost["unjudged"] else ""
    return (
        f"answers by length in tokens: {'  '.join(bars)}; ended by {ends}; {cost['mask_tokens']} mask tokens{unjudged}"
    )
