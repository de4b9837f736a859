"""Where tables of results go, and the line under them that says what they were measured on."""

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console


def wide_console(width: int = 140) -> Console:
    """Standard output, not narrower than our tables where it is a file or a pipe."""
    console = Console(file=sys.stdout)
    return console if console.is_terminal else Console(file=sys.stdout, width=max(console.width, width))


def machine_line(result: Mapping[str, Any]) -> str:
    """Device, dtype, threads, block size and versions in one line."""
    ran_on, card = result["machine"], result["card"]
    return (
        f"{ran_on['device_name'] or ran_on['device']}, {ran_on['dtype']}, {ran_on['threads']} threads, "
        f"block size {card['block_size']}, shift {card['shift']}, torch {ran_on['versions']['torch']}, "
        f"transformers {ran_on['versions']['transformers']}"
    )
