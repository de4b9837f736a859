"""`hilda.json`: what a diffusion checkpoint must say about itself (alignment is never a trainer flag)."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from hildanext.core.config import config, plain, validate
from hildanext.core.errors import CheckpointError
from hildanext.core.json_text import BadJson, parse
from hildanext.masks import CleanMask

CARD = "hilda.json"
FORMAT_VERSION = 1
DRAFTS = "drafts"
"""`kind` of the `hilda.json` of draft adapters (`models.draft_card`)."""
ONNX = "onnx"
"""`kind` of the `hilda.json` of an exported network (`export.onnx_card`)."""

Alignment = Literal["block", "parent"]


@config
class Fast:
    """The setting of a decoder that `hildanext bench frontier --save` found for a checkpoint, and how it was found.

    Of all that were measured it wrote the most tokens per forward at the nats per token (under the parent) of one token
    a step, or fewer.
    """

    decoder: dict[str, Any]
    """A decoder's section; whoever decodes checks it."""
    tokens_per_forward: float
    nats: float
    base_tokens_per_forward: float
    """Of one token a step."""
    base_nats: float
    prompts: int = Field(ge=1)
    new_tokens: int = Field(ge=1)


@config
class ResidualCard:
    """What the inputs of a training with residuals were (`decoding.residual`, whose knobs these are)."""

    lam: float = Field(gt=0, le=1, allow_inf_nan=False)
    t_res: float = Field(gt=0, allow_inf_nan=False)
    top: int = Field(ge=0)


@config
class Card:
    """The conventions a checkpoint was trained with.

    `shift`: "none" means that the logits at i predict token i, "left" that the logits at i-1 do.
    """

    mask_id: int = Field(ge=0)
    shift: Literal["none", "left"]
    clean_mask: CleanMask
    block_size: int = Field(ge=1)
    block_grid: Literal["document"] = "document"
    vocab_rows: int = Field(ge=1)
    """Rows of the embedding."""
    vocab_real: int = Field(ge=1)
    """Ids below this one are real tokens; the mask and the unused rows lie at or above it, or equal `mask_id`."""
    parent: str = ""
    """Name or path of the autoregressive model this one was converted from."""
    never: tuple[int, ...] = ()
    """Further ids that may never be emitted (padding that is not the end of text)."""
    chat: bool = False
    """Fine-tuned on conversations: benchmarks ask it in the chat template unless they are told otherwise."""
    fast: Fast | None = None
    """What `--mode fast` decodes with; None: nobody has measured it."""
    residual: ResidualCard | None = None
    """Trained with residual inputs; None: with plain masks alone. A later plain fine-tuning leaves it as it is."""
    format_version: int = FORMAT_VERSION

    @property
    def alignment(self) -> Alignment:
        return "parent" if self.shift == "left" else "block"


def fast_section(card: Card | None) -> dict[str, Any] | None:
    """The decoder's section of mode `fast`; None where nobody has measured it."""
    return dict(card.fast.decoder) if card is not None and card.fast is not None else None


def alignment_fields(alignment: Alignment) -> dict[str, str]:
    """The card fields an alignment stands for (DESIGN.md, convention 2)."""
    if alignment == "parent":
        return {"shift": "left", "clean_mask": "token_causal"}
    return {"shift": "none", "clean_mask": "block_causal"}


def read_card(folder: str | Path) -> Card:
    """Read `hilda.json`. Raises `CheckpointError` where it is missing, broken or of another format."""
    path = Path(folder) / CARD
    try:
        fields = parse(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{str(folder)!r} has no {CARD}",
            "a diffusion checkpoint carries one; an autoregressive model is converted first: hildanext convert",
        ) from None
    except (OSError, BadJson) as problem:
        raise CheckpointError(f"{path} is broken ({problem})", "copy the checkpoint again") from None
    if isinstance(fields, dict) and fields.get("kind") == DRAFTS:
        raise CheckpointError(
            f"{str(folder)!r} holds draft adapters of a parent that stays, and no diffusion model",
            "they write in exact mode alone: --mode exact",
        )
    if isinstance(fields, dict) and fields.get("kind") == ONNX:
        raise CheckpointError(
            f"{str(folder)!r} is an export for ONNX Runtime, which computes generation alone",
            "give the checkpoint that it was made of",
        )
    if not isinstance(fields, dict) or fields.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is of another format",
            f"this version reads format {FORMAT_VERSION}; install the hildanext that wrote it",
        )
    card = validate(Card, fields, where=str(path), strict=True)
    outside = [index for index in (card.mask_id, *card.never) if not 0 <= index < card.vocab_rows]
    if outside or card.vocab_real > card.vocab_rows:
        wrong = f"id {outside[0]}" if outside else f"vocab_real {card.vocab_real}"
        raise CheckpointError(f"{path} has {wrong} and {card.vocab_rows} rows", "copy the checkpoint again")
    return card


def card_text(card: Card) -> str:
    """The file's text. What nobody has measured or trained is not in it, so that an older version reads it."""
    fields = plain(card)
    for name in ("fast", "residual"):
        if fields[name] is None:
            del fields[name]
    return json.dumps(fields, indent=2) + "\n"
