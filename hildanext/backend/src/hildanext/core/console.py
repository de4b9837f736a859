"""Where tables of results go, and the line under them that says what they were measured on."""

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console

WIDEST = 1000
"""Of a table in a file or a pipe: as wide as it is, since nothing is cut there."""


def wide_console() -> Console:
    """Standard output; where it is a file or a pipe nothing is wrapped or cut, so that `| grep` finds whole lines."""
    console = Console(file=sys.stdout)
    return console if console.is_terminal else Console(file=sys.stdout, width=WIDEST, soft_wrap=True)


def machine_line(result: Mapping[str, Any]) -> str:
    """Device, dtype, threads, block size (where blocks were decoded) and versions in one line."""
    ran_on, card = result["machine"], result.get("card")
    blocks = "" if card is None else f"block size {card['block_size']}, shift {card['shift']}, "
    return (
        f"{ran_on['device_name'] or ran_on['device']}, {ran_on['dtype']}, {ran_on['threads']} threads, "
        f"{blocks}torch {ran_on['versions']['torch']}, "
        f"transformers {ran_on['versions']['transformers']}"
    )
