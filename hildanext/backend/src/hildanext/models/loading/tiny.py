"""The embedded pair: a small autoregressive model and its diffusion twin, shipped as package data.

`scripts/train_tiny.py` makes both.
"""

from importlib.resources import files
from pathlib import Path
from typing import Literal

from hildanext.core.errors import ModelError


def folder(kind: Literal["ar", "diffusion"]) -> Path:
    """The folder of one of the pair. Raises `ModelError` where this installation lacks it."""
    path = Path(str(files("hildanext"))) / "assets" / "tiny" / kind
    if not (path / "config.json").is_file():
        raise ModelError(
            f"the embedded model's {kind} half is not in this installation", "reinstall, or run scripts/train_tiny.py"
        )
    return path
