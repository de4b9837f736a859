"""The section of the engine dinfer, and the commit it was written against. Loads no torch."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from hildanext.core.config import config
from hildanext.core.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from hildanext.engine.base import Engine

PINNED = "fce4e32804103baa5d55230dff0352da0cdd6ceb"
"""The commit of github.com/inclusionAI/dInfer whose interface the adapter was written against."""


@config
class DInferConfig:
    """How dInfer is started; all of it holds for every request."""

    mode: str = "S_MODE"
    """Its threshold is this mode's; requests of another mode are refused. A second mode is a second server."""
    backend: Literal["sglang", "vllm"] = "sglang"
    block_length: int = Field(default=32, ge=1)
    call_blocks: int = Field(default=4, ge=1)
    """Blocks of one call. Each call feeds all that is written so far once; between calls a text can end."""
    max_length: int = Field(default=4096, ge=64)
    num_gpus: int = Field(default=1, ge=1)
    server_port: int = Field(default=12345, ge=1, le=65000)
    mask_id: int | None = Field(default=None, ge=0)
    """None: the tokenizer's."""
    edits: Literal["answer", "refuse"] = "answer"
    """A request that wants editing is answered without, and the answer says so; or it is refused."""
    special_tokens_in_text: bool = False
    """Parse control tokens that a message spells (`<|im_end|>`), as those of the template. Usually they are text."""
    queue: int = Field(default=16, ge=0)
    probe_seconds: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    request_seconds: float = Field(default=300.0, gt=0, allow_inf_nan=False)
    """Longest that one text may take; after it dInfer is stopped for good. The first waits for the weights, too."""
    commit: str | None = PINNED
    """The commit it must be; None takes any, at one's own risk."""

    def open(self, model: str, parent: str | None, reason: str) -> "Engine":
        """Start it. Raises `ModelError` and `ConfigError` with what stands against it, `EngineFailed`."""
        from transformers import AutoTokenizer

        from hildanext.engine.dinfer.adapter import DInferEngine
        from hildanext.engine.dinfer.probe import probe, why_not_here, why_not_model

        if parent is not None:
            raise ConfigError("the engine dinfer runs no autoregressive parent", "leave the parent out")
        against = why_not_model(model, self.backend)
        if against:
            raise ModelError(f"dinfer cannot run this model: {against}", "use the engine local")
        against = why_not_here(probe(self.probe_seconds), self.backend, self.commit)
        if against:
            raise ConfigError(f"dinfer cannot be used here: {against}", "use the engine local")
        return DInferEngine(self, model, AutoTokenizer.from_pretrained(model), reason)
