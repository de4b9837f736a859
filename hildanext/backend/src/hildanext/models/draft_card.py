"""`hilda.json` of a set of draft adapters: whose they are, how they were trained, how often their drafts were right.

Beside it lie the adapters in peft's own format (`adapter_config.json`, `adapter_model.safetensors`), which peft loads
as plain LoRA, and `places.safetensors`: the vectors of the mask rows, the sampler head, the ids that drafts may say.
The gate is not part of peft's format: whoever loads the adapters without this package adapts every row.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from hildanext.core.config import config, plain, validate
from hildanext.core.errors import CheckpointError, ModelError
from hildanext.core.json_text import BadJson, parse
from hildanext.models.card import CARD, DRAFTS, FORMAT_VERSION
from hildanext.models.gated_lora import GatedLoraConfig
from hildanext.models.loading.names import locate_drafts


@config
class DraftCard:
    """What drafts of a kept parent need to know."""

    kind: Literal["drafts"] = "drafts"
    gate: Literal["noisy"] = "noisy"
    """The rows that the adapters act on; all others are the parent's."""
    parent: str
    """Name of the parent, whose weights stay where they are."""
    parent_hash: str
    """Of its weights (`loading.files.weights_hash`)."""
    places: int = Field(ge=1)
    """Mask rows of a group at most: tokens that are drafted at a time."""
    enter: int = Field(default=0, ge=0)
    """The layer at which mask rows enter."""
    shared_place: bool = False
    sampler: int | None = Field(default=None, ge=1)
    """Inner size of the sampler head, which tells a mask the token before its own; None: there is none."""
    vocabulary: int | None = Field(default=None, ge=1)
    """How many tokens drafts may say; None: all."""
    lora: GatedLoraConfig = GatedLoraConfig()
    acceptance: tuple[float, ...] = ()
    """Entry j - 1: the share of held-out places at which the first j drafts were right, j drafts behind every token."""
    trained_on: str = ""
    """What the adapters have seen."""
    mask_positions: int = Field(default=0, ge=0)
    """Masks that they have learnt from."""
    format_version: int = FORMAT_VERSION

    @property
    def costs(self) -> tuple[int, int, bool, int | None]:
        """What decides how long mask rows take, beside their parent."""
        return self.enter, self.lora.rank, self.sampler is not None, self.vocabulary


def is_draft_folder(folder: str | Path) -> bool:
    """Whether `hilda.json` there says that the folder holds draft adapters."""
    return _fields(Path(folder)).get("kind") == DRAFTS


def holds_drafts(name: str) -> bool:
    """Whether a name is that of a set of draft adapters. Raises `CheckpointError` where its card is broken."""
    try:
        return is_draft_folder(locate_drafts(name))
    except ModelError:
        return False


def read_draft_card(folder: str | Path) -> DraftCard:
    """Raises `CheckpointError` where there is none, or where it is broken or of another format or kind."""
    path = Path(folder) / CARD
    fields = _fields(Path(folder))
    if fields.get("kind") != DRAFTS:
        raise CheckpointError(
            f"{str(folder)!r} holds no draft adapters",
            "give a folder that `save_drafts` wrote",
        )
    if fields.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is of another format", f"this version reads format {FORMAT_VERSION}; install the one that wrote it"
        )
    return validate(DraftCard, fields, where=str(path), strict=True)


def draft_card_text(card: DraftCard) -> str:
    return json.dumps(plain(card), indent=2) + "\n"


def _fields(folder: Path) -> dict[str, Any]:
    """Of `hilda.json`; none where it is not there."""
    path = folder / CARD
    try:
        fields = parse(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, BadJson) as problem:
        raise CheckpointError(f"{path} is broken ({problem})", "copy the checkpoint again") from None
    return fields if isinstance(fields, dict) else {}
