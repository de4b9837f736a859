"""HILDA: any autoregressive transformer becomes an editable discrete-diffusion language model.

    from hildanext import generate, load, stream

    model = load("tiny")                                          a name, a hub id or a folder
    print(generate(model, "Once upon a time").text)               text, tokens and counts
    for piece in stream(model, "Once upon a time", mode="Q_MODE"):
        print(piece, end="")

The three are loaded when they are asked for (PEP 562): `import hildanext` loads no torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

__all__ = ["__version__", "generate", "load", "stream"]

_FACADE = {"load": "load_model", "generate": "generate_text", "stream": "stream_text"}
"""Public name to the function of `facade` behind it."""


def __getattr__(name: str) -> Any:
    if name in _FACADE:
        return getattr(importlib.import_module("hildanext.facade"), _FACADE[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_FACADE])
