"""The recipe of a fine-tuning: its knobs and their defaults, checked."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from hildanext.core.config import config, merge, validate
from hildanext.core.errors import ConfigError
from hildanext.corruption.noising import NoiseConfig
from hildanext.data.chat_dataset import ChatDataConfig, open_sources
from hildanext.losses import make_losses
from hildanext.models.lora import LoraConfig
from hildanext.models.quantize import Quantize, check_quantize
from hildanext.models.tuning import ParentConfig
from hildanext.trainer.config import TrainConfig
from hildanext.trainer.sample_generations import SampleConfig

TRAIN_DEFAULTS = {"learning_rate": {"peak": 1e-4, "warmup": 0.03, "decay": 0.97}}
"""Under what the section says: fine-tuning wants a lower rate than conversion, falling from the start."""


@config
class SftConfig(NoiseConfig):
    """The recipe of a fine-tuning.

    Paper: LLaDA2.0, arXiv:2512.15745, sec. 5.1 (prompts clean, band of noise levels, complementary masks), band and
    plain mean from its released code; LLaDA2.1, arXiv:2602.08676, sec. 3.1 (M2T and T2T together, multi-turn forward).
    Differs: rates, weights and the number of turns are ours, as none are published.
    """

    model: str | None = None
    """A diffusion checkpoint. This or `parent`."""
    parent: ParentConfig | None = None
    t_range: tuple[float, float] = (0.3, 0.8)
    complementary: bool = True
    losses: tuple[dict[str, Any], ...] = (
        {"name": "m2t", "weighting": "masked_mean"},
        {"name": "t2t"},
    )
    turns: int = Field(default=2, ge=1, le=4)
    """Forwards per view: each mends wrong tokens, in the first random ones, later the model's own; labels are the
    truth."""
    epochs: float = Field(default=1.0, gt=0)
    lora: LoraConfig | None = None
    quantize: Quantize | None = None
    """`nf4`: the frozen linear layers under the adapters in 4 bits (QLoRA)."""
    teacher: str | None = None
    """The parent for losses that need one; None is the parent that the checkpoint's card names."""
    valid_rows: int = Field(default=64, ge=1)
    select: Literal["bound", "masked_accuracy"] = "bound"
    """What the best checkpoint is best in, on held-out rows."""
    keep: Literal["best", "last"] = "best"
    patience: int | None = Field(default=None, ge=1)
    """Stop after so many validations without a better one."""
    samples: SampleConfig = SampleConfig()
    device: str = "auto"
    seed: int = 0
    train: TrainConfig = TrainConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.model is None) == (self.parent is None):
            raise ConfigError("sft needs one start", "give model (a diffusion checkpoint) or parent (autoregressive)")

    @property
    def start(self) -> str | ParentConfig:
        """What is trained."""
        return self.parent if self.parent is not None else str(self.model)


def check(sft_section: Mapping[str, Any], data_section: Mapping[str, Any]) -> tuple[SftConfig, ChatDataConfig]:
    """Validate the two sections without loading anything heavy. Raises `ConfigError`."""
    section = dict(sft_section)
    if isinstance(section.get("train", {}), Mapping):
        section["train"] = merge(TRAIN_DEFAULTS, section.get("train", {}))
    config = validate(SftConfig, section, "sft")
    make_losses(config.losses, "sft.losses")
    data = validate(ChatDataConfig, data_section, "chat")
    open_sources(data)
    check_quantize(config.quantize, config.lora is not None)
    return config, data
