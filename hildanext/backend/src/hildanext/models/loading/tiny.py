"""The embedded pair: a small autoregressive model and its diffusion twin, shipped as package data.

`scripts/train_tiny.py` makes both.
"""

from importlib.resources import files
from pathlib import Path
from typing import Literal

from hildanext.core.errors import ModelError


def folder(kind: Literal["ar", "diffusion", "drafts"]) -> Path:
    """The folder of one of the pair, or of the draft adapters beside the first.

    Raises `ModelError` where this installation lacks it.
    """
    path = Path(str(files("hildanext"))) / "assets" / "tiny" / kind
    if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise ModelError(
            f"the embedded model's part {kind!r} is not in this installation", "reinstall, or run scripts/train_tiny.py"
        )
    return path
