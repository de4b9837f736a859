"""What samples answers: a configuration that opens a `Sampler`, which is handed prompts and seeds."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from pydantic import Field

from hildanext.core.config import config
from hildanext.rl.batch import Answer
from hildanext.rl.policy import Policy

Ids = tuple[int, ...]


@runtime_checkable
class Sampler(Protocol):
    """Answers of one policy. `close` it."""

    def sample(
        self, prompts: Sequence[Ids], seeds: Sequence[int], temperature: float | None = None
    ) -> list[Answer | None]:
        """An answer to each prompt by its seed, all asked in one moment; None where it was not whole in time.
        `temperature` None is the rollouts' own."""
        ...

    def changed(self) -> None:
        """The policy's weights are others than at the last call."""
        ...

    def facts(self) -> Mapping[str, Any]:
        """Who samples, for the run's manifest."""
        ...

    def close(self) -> None: ...


@config
class Rollouts:
    """How answers are sampled."""

    traced: ClassVar[bool] = True
    """Whether it tells how likely each action was."""

    max_new_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    seconds: float | None = Field(default=None, gt=0)
    """What is not whole by then, from the moment it is asked, is dropped and counted."""

    @property
    def together(self) -> int:
        """Answers that are asked in one moment, and kept in one file."""
        return 64

    @property
    def biased(self) -> bool:
        """Whether recorded log-probabilities are not those of the actions."""
        return False

    def open(self, policy: Policy, profile: str) -> Sampler:
        """Raises `ConfigError` for what the policy or the machine cannot do."""
        raise NotImplementedError(f"{type(self).__name__} opens no sampler")
