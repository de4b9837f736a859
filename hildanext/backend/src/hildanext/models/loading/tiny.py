"""The embedded pair: a small autoregressive model and its diffusion twin, shipped as package data with adapters that
draft for the first.

`scripts/train_tiny.py` makes all three.
"""

from importlib.resources import files
from pathlib import Path
from typing import Literal

from hildanext.core.errors import ModelError


def folder(kind: Literal["ar", "diffusion", "drafts"]) -> Path:
    """The folder of one of the pair, or of the adapters that draft for the first. Raises `ModelError` where this
    installation lacks it."""
    path = Path(str(files("hildanext"))) / "assets" / "tiny" / kind
    if not (path / ("hilda.json" if kind == "drafts" else "config.json")).is_file():
        raise ModelError(
            f"the embedded model's {kind} part is not in this installation", "reinstall, or run scripts/train_tiny.py"
        )
    return path
