"""What can go wrong, each with what to do about it. `HildaError` is the only base."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Literal


class HildaError(Exception):
    """An error a user can cause. Prints as one line: what happened, then what to do.

    `exit_code` is what the command line returns, `status` what the service answers.
    """

    exit_code = 2
    status = 400

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}: {self.hint}" if self.hint else self.message

    def line(self) -> str:
        """As the command line shows it: one line, whatever is in the message."""
        return f"error: {' '.join(str(self).split())}"


class UnknownChoice(HildaError):
    """A name that no family member has."""

    def __init__(self, kind: str, name: str, choices: Iterable[str]) -> None:
        choices = sorted(choices)
        close = get_close_matches(name, choices, n=1)
        guess = f"did you mean {close[0]!r}? " if close else ""
        super().__init__(f"unknown {kind} {name!r}", hint=f"{guess}choices: {', '.join(choices)}")


class ConfigError(HildaError):
    """A configuration that cannot be read or does not validate."""


class ModelError(HildaError):
    """A model that is missing, half there, or of a kind we do not support."""


class DataError(HildaError):
    """A corpus or a shard that cannot be used."""


class PromptError(HildaError):
    """A prompt that does not fit the model."""


class CheckpointError(HildaError):
    """A checkpoint that could not be written, or does not fit the run that asks for it."""


class StorageError(CheckpointError):
    """Something could not be written: the disk is full, read-only or gone."""

    status = 507


class TrainingStopped(HildaError):
    """A guard stopped the run; the last good checkpoint is kept."""


class NumericsError(HildaError):
    """A forward outside our attention seam, or a result that is not a number."""


class LogitsNotFinite(NumericsError):
    """A model whose next token cannot be told. `rows` are those of a batch that it concerns."""

    status = 500

    def __init__(self, who: Literal["diffusion model", "autoregressive parent"], rows: Iterable[int] = ()) -> None:
        super().__init__(
            f"the logits of the {who} are NaN or infinite",
            "its weights are broken, or too large for this dtype: copy the model again, or try fp32",
        )
        self.rows = frozenset(rows)


class RewardError(HildaError):
    """A reward that does not keep its word: too few scores, one that is no number, or one outside its range."""


class SandboxError(HildaError):
    """Generated programs cannot be run here with the isolation that was asked for."""
