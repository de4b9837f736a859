"""`hilda.json` of an exported network: what it was made of, in which type, and its shape."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from hildanext.core.config import config, plain, validate
from hildanext.core.errors import CheckpointError
from hildanext.core.json_text import BadJson, parse
from hildanext.models.card import CARD, ONNX, Card
from hildanext.models.draft_card import DraftCard

EXPORT_VERSION = 4
"""Of graphs and card together. It grows whenever either changes, and caches are made anew."""
Precision = Literal["fp32", "q8", "q4"]


@config
class Distance:
    """Of an export from its parent in fp32 torch, by token, on text that the parent draws; of a diffusion model by mask
    (`runtimes.onnx_check`)."""

    nats: float
    """More -log p than the parent has."""
    kl: float
    argmax: float
    """Share of places at which both say the same."""

    def line(self) -> str:
        return f"{self.nats:+.4f} nats, KL {self.kl:.4f}, argmax {self.argmax:.1%}"


@config
class OnnxCard:
    """What `runtimes.onnx_network` needs beside the graphs."""

    kind: Literal["onnx"] = "onnx"
    dtype: Precision
    parent: str
    """Name of the autoregressive model, or of the diffusion checkpoint."""
    parent_hash: str
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    hidden: int = Field(ge=1)
    vocab: int = Field(ge=1)
    inv_freq: tuple[float, ...]
    rope_scale: float
    unsigned: bool = False
    """8-bit matrices for processors that saturate on signed ones."""
    drafts: DraftCard | None = None
    """Of the draft adapters within; None: the parent alone."""
    diffusion: Card | None = None
    """Of the diffusion model that this is; None: an autoregressive one."""
    distance: Distance | None = None
    export_version: int = EXPORT_VERSION


def is_onnx_folder(folder: str | Path) -> bool:
    """Whether `hilda.json` there says that the folder holds an exported network."""
    try:
        fields = parse((Path(folder) / CARD).read_bytes())
    except (OSError, BadJson):
        return False
    return isinstance(fields, dict) and fields.get("kind") == ONNX


def read_onnx_card(folder: str | Path) -> OnnxCard:
    """Raises `CheckpointError` where it is broken or of another version."""
    path = Path(folder) / CARD
    try:
        fields: Any = parse(path.read_bytes())
    except (OSError, BadJson) as problem:
        raise CheckpointError(f"{path} cannot be read ({problem})", "export the model again") from None
    if not isinstance(fields, dict) or fields.get("kind") != ONNX or fields.get("export_version") != EXPORT_VERSION:
        raise CheckpointError(f"{path} is of no export that this version reads", "export the model again")
    return validate(OnnxCard, fields, where=str(path), strict=True)


def onnx_card_text(card: OnnxCard) -> str:
    return json.dumps(plain(card), indent=2) + "\n"
