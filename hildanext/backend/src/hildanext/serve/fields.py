"""What a body may ask of decoding, under all the names in use, and the decoder's section it becomes."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from hildanext.decode import EFFORTS, MODE_ALIASES, MODES, decoder_section
from hildanext.serve.refusals import Refused

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1, le=1 << 30)]
Seed = Annotated[int, Field(ge=-(1 << 63), le=(1 << 63) - 1)]

REASONING = {"none": "instant", "minimal": "instant", "xhigh": "high"} | {name: name for name in EFFORTS}
"""`reasoning_effort`, as other services name it, to our efforts."""

ALIASES = {
    "tau_mask": ("threshold",),
    "tau_edit": ("editing_threshold", "edit_threshold"),
    "max_post": ("max_post_steps", "max_post_edit_steps"),
    "block_size": ("block_length",),
    "steps_per_block": ("max_denoising_steps", "num_inference_steps"),
}
"""Knob to the names it has elsewhere."""


class Answer(BaseModel):
    """A JSON object that the service sends."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Body(BaseModel):
    """A JSON object of known fields and exact types; numbers are finite. A field that is null is not given."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def known(cls, value: Any) -> Any:
        """Name an unknown field and the known one it resembles."""
        if not isinstance(value, Mapping):
            return value
        for name in value:
            if name not in cls.model_fields:
                close = get_close_matches(str(name), cls.model_fields, n=3)
                guess = f"did you mean {' or '.join(map(repr, close))}?" if close else "it has no such field"
                raise PydanticCustomError(
                    "unknown_field", "unknown field: {guess}", {"field": str(name), "guess": guess}
                )
        return value


class Decoding(Body):
    """How a text is written. Everything is optional, and laid over the mode."""

    mode: str | None = Field(None, json_schema_extra={"enum": [*MODES, *MODE_ALIASES, None]})
    """S_MODE (fills early, edits on any disagreement) or Q_MODE (cautious)."""
    effort: str | None = Field(None, json_schema_extra={"enum": [*EFFORTS, None]})
    tau_mask: Probability | None = None
    """A mask is filled above this probability."""
    tau_edit: Probability | Literal["off"] | None = None
    """A written token is replaced above this probability; "off" switches editing off."""
    tau_cautious: Probability | None = None
    max_post: int | None = Field(None, ge=0, le=4096)
    """Forwards a block may have after its last mask was filled."""
    window: int | None = Field(None, ge=0, le=64)
    """Finished blocks that may still be edited."""
    temperature: float | None = Field(None, ge=0.0, le=2.0)
    """0 (default) is greedy."""
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    top_k: Count | None = None
    block_size: Count | None = None
    """Belongs to the checkpoint: any other than its own is refused."""
    steps_per_block: Count | None = None
    """Of fixed schedules. Here thresholds decide, and a block never needs more forwards than tokens to be filled."""
    threshold: Probability | None = Field(None, description="alias of tau_mask")
    editing_threshold: Probability | Literal["off"] | None = Field(None, description="alias of tau_edit")
    edit_threshold: Probability | Literal["off"] | None = Field(None, description="alias of tau_edit")
    max_post_steps: int | None = Field(None, ge=0, le=4096, description="alias of max_post")
    max_post_edit_steps: int | None = Field(None, ge=0, le=4096, description="alias of max_post")
    block_length: Count | None = Field(None, description="alias of block_size")
    max_denoising_steps: Count | None = Field(None, description="alias of steps_per_block")
    num_inference_steps: Count | None = Field(None, description="alias of steps_per_block")

    def knob(self, name: str) -> Any:
        """A knob's value under whichever of its names it was given. Raises `Refused` where two names disagree."""
        given = {key: getattr(self, key) for key in (name, *ALIASES.get(name, ()))}
        given = {key: value for key, value in given.items() if value is not None}
        if len(set(map(str, given.values()))) > 1:
            raise Refused(400, f"{' and '.join(given)} are one knob", "give one of them", next(iter(given)))
        return next(iter(given.values()), None)

    def section(self, block_size: int | None, effort: str | None = None) -> dict[str, Any]:
        """The decoder's section. Raises `Refused`, `UnknownChoice`."""
        changes = {name: self.knob(name) for name in ("tau_mask", "tau_edit", "max_post")}
        changes |= {name: getattr(self, name) for name in ("tau_cautious", "window", "temperature", "top_p", "top_k")}
        given = {name: value for name, value in changes.items() if value is not None}
        if given.get("tau_edit") == "off":
            given["tau_edit"] = None
        self._check_blocks(block_size)
        effort = self.effort if self.effort is not None else effort
        section = decoder_section(self.mode if self.mode is not None else "S_MODE", effort, **given)
        if section.get("window", 0) > 0 and section["tau_edit"] is None:
            raise Refused(
                400, "window edits finished blocks, but editing is off", "give tau_edit, or window 0", "window"
            )
        return section

    def _check_blocks(self, block_size: int | None) -> None:
        wanted, steps = self.knob("block_size"), self.knob("steps_per_block")
        if wanted is not None and wanted != block_size:
            own = f"is {block_size}" if block_size is not None else "is not known"
            raise Refused(
                400,
                f"block_size {wanted}: the model's {own}, and belongs to the checkpoint",
                "leave it out",
                "block_size",
            )
        if steps is not None and (block_size is None or steps < block_size):
            raise Refused(
                400,
                f"steps_per_block {steps}: thresholds decide here how many forwards a block takes",
                "leave it out; lower tau_mask, or effort instant or low, for fewer",
                "steps_per_block",
            )


def stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    """One stop string or several, as a tuple. Raises `Refused` for an empty one."""
    found = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if any(not word for word in found):
        raise Refused(400, "a stop string is empty", "leave it out", "stop")
    return found
