"""A diffusion model ready to be asked, opened the same way everywhere: by name, on a device, in a dtype, on threads.

Nothing falls back silently: what cannot be had is an error, and a model that was never trained says so (`untrained`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hildanext.core.runtime import Runtime, RuntimeConfig, machine
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.card import Alignment, Card
from hildanext.models.loading.load import load_diffusion
from hildanext.models.loading.names import names_checkpoint
from hildanext.models.start import open_beside, start_conversion


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer, and what it runs on."""

    name: str
    model: DiffusionModel
    tokenizer: PreTrainedTokenizerBase
    runtime: Runtime
    untrained: bool = False
    """An autoregressive model under a new card: good for measuring, not for reading."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Laid over the summary; where another runtime than torch computes it, what that is."""

    @classmethod
    def open(cls, name: str, config: RuntimeConfig) -> "LoadedModel":
        """Set the threads and load a diffusion checkpoint.

        Raises `ConfigError` for a device or a number of threads that cannot be, `UnknownChoice` for a dtype,
        `ModelError` and `CheckpointError` for a model.
        """
        runtime = config.resolve()
        return cls(name, *load_diffusion(name, runtime.dtype, runtime.device), runtime)

    @classmethod
    def open_or_convert(cls, name: str, config: RuntimeConfig, alignment: Alignment, block_size: int) -> "LoadedModel":
        """A diffusion checkpoint where the name is one, else an autoregressive model under a new card, `untrained`."""
        if names_checkpoint(name):
            return cls.open(name, config)
        runtime = config.resolve()
        model, tokenizer = start_conversion(name, alignment, block_size, runtime.dtype, runtime.device)
        return cls(name, model.eval(), tokenizer, runtime, untrained=True)

    @property
    def card(self) -> Card:
        return self.model.card

    @property
    def parent_name(self) -> str:
        """The autoregressive model that it was made of; "" where its card names none."""
        return self.name if self.untrained else self.card.parent

    def parent(
        self, name: str | None = None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Bool[Tensor, " vocab"]]:
        """What `ar.Parent` takes: the parent under this model's own vocabulary, so that in neither of them the mask or
        an unused row gets any probability. Raises `ModelError` for one that it was not made of.
        """
        name = name if name is not None else self.parent_name
        frozen, tokenizer = open_beside(name, self.model, self.tokenizer, self.model.dtype)
        return frozen.causal_lm.eval(), tokenizer, self.model.banned

    def machine(self) -> dict[str, Any]:
        """What a result was measured on, for its record."""
        return machine(self.runtime.device, self.runtime.dtype)

    def summary(self) -> dict[str, Any]:
        """The few facts that stand beside each text."""
        return {
            "model": self.name,
            "dtype": str(self.runtime.dtype).removeprefix("torch."),
            "device": str(self.runtime.device),
            "threads": self.runtime.threads,
            "block_size": self.card.block_size,
            **self.facts,
        }
