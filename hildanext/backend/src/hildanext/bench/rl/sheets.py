"""A table as numbers in words: for a terminal, and as Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Sheet:
    """Rows of cells; the first column is names."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def table(self) -> Table:
        table = Table(title=self.title, title_justify="left", caption=self.caption or None, caption_justify="left")
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        lines = [f"| {' | '.join(row)} |" for row in (self.columns, ["---"] * len(self.columns), *self.rows)]
        return f"**{self.title}**\n\n" + "\n".join(lines) + (f"\n\n{self.caption}\n" if self.caption else "\n")


def document(sheets: Sequence[Sheet], machine: Mapping[str, Any], more: str = "") -> str:
    """All of them as Markdown, after what they were measured on."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    ran_on = f"{machine['device_name'] or machine['device']}, {machine['dtype']}, {machine['threads']} threads"
    head = f"{ran_on}. {versions}.{' ' + more if more else ''}\n"
    return "\n".join([head, *(sheet.markdown() for sheet in sheets)])


def cell(value: float | int | None, shape: str = ".2f") -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None or value != value else f"{value:{shape}}"
