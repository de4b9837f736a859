"""What an extraction met, as rows of a table: counts and shares of what they are shares of."""

from collections.abc import Mapping

ROWS: tuple[tuple[str, str | None], ...] = (
    ("examples", None),
    ("examples with equations", "examples"),
    ("examples resolved", "examples"),
    ("graphs", "examples"),
    ("annotations", None),
    ("equations", "annotations"),
    ("wrong equations", "annotations"),
    ("unreadable equations", "annotations"),
    ("results not written", "annotations"),
    ("operands", None),
    ("operands: results", "operands"),
    ("operands: question numerals", "operands"),
    ("operands: number words", "operands"),
    ("operands: constants", "operands"),
    ("operands: unresolved", "operands"),
    ("operands: ambiguous", "operands"),
    ("numerals of that value: one", "operands"),
    ("numerals of that value: several", "operands"),
    ("numerals of that value: none", "operands"),
    ("examples with an answer", "examples"),
    ("answer is the last result", "examples"),
    ("answer is an earlier result", "examples"),
    ("links", None),
    ("links without a place", "links"),
    ("links between overlapping phrases", "links"),
    ("graphs with a circle", "links"),
    ("phrases", None),
    ("phrases not found", "phrases"),
    ("nodes", None),
    ("edges", None),
    ("ambiguous edges", "edges"),
    ("records refused", None),
)
"""Name of a count, and of the count it is a share of."""

MEANS = (("equations", "examples"), ("operands", "examples"), ("edges", "graphs"))


def table(counts: Mapping[str, int]) -> list[tuple[str, int, str]]:
    """(name, count, remark) of every row that was met; the remark is the share, or the mean per example."""
    rows = []
    means = dict(MEANS)
    for name, whole in ROWS:
        count = counts.get(name, 0)
        if not count and (whole is None or whole == "examples" or not counts.get(whole)):
            continue
        remark = f"{100 * count / counts[whole]:.1f} % of {whole}" if whole is not None and counts.get(whole) else ""
        if name in means and counts.get(means[name]):
            mean = f"{count / counts[means[name]]:.2f} per {means[name].removesuffix('s')}"
            remark = f"{remark}, {mean}" if remark else mean
        rows.append((name, count, remark))
    return rows
