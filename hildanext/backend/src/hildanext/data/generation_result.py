"""What one generation yields, whoever wrote it: tokens, text, why it ended, what it cost; and its one JSON form.

The command line, the recipe's samples, files of answers and evaluations all keep keys of `to_record`, so that a field
has one name and one meaning everywhere. Loads no torch.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class GenerationStats:
    """Counts of one text: the forwards it took part in, the tokens it kept."""

    prefill_forwards: int = 0
    """Of an autoregressive model: those that read a piece of the prompt and drew nothing."""
    denoise_forwards: int = 0
    """Of an autoregressive model: those that drew a token."""
    commit_forwards: int = 0
    """Forwards that did nothing but commit a block; a fused commit costs none."""
    revise_forwards: int = 0
    tokens: int = 0
    edits: int = 0
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    rows: int = 0
    """Tokens that were fed, clean ones and noisy ones, by all forwards but the prefill's: a wide forward is not a cheap
    one. 0 where nobody tells."""

    @classmethod
    def total(cls, parts: Iterable["GenerationStats"]) -> "GenerationStats":
        """Sums over texts; of the seconds too, as if one text had been written after another."""
        every = list(parts)
        return cls(**{part.name: sum(getattr(stats, part.name) for stats in every) for part in fields(cls)})

    @property
    def forwards(self) -> int:
        """All of them; 0 where a server does not tell."""
        return self.prefill_forwards + self.denoise_forwards + self.commit_forwards + self.revise_forwards

    @property
    def tokens_per_forward(self) -> float:
        """Kept tokens over all forwards but the prefill; 0 where forwards are not known."""
        return self.tokens / max(self.forwards - self.prefill_forwards, 1) if self.forwards else 0.0

    @property
    def rows_per_token(self) -> float:
        """Rows fed for each kept token; 0 where rows are not known."""
        return self.rows / max(self.tokens, 1)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    def to_record(self) -> dict[str, Any]:
        """Counts and what follows from them, in JSON types."""
        derived = ("forwards", "tokens_per_forward", "rows_per_token", "tokens_per_second")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


@dataclass(frozen=True)
class GenerationResult:
    """The answer to one prompt. `tokens` hold the end-of-text token that ended it, `text` does not."""

    tokens: list[int]
    text: str
    """Empty where there was no tokenizer."""
    finish_reason: FinishReason
    stats: GenerationStats
    trace: list[Any] = field(default_factory=list)
    """`decoding.state.Step` by step, where they were asked for; `decoding.trace.trace_record` writes them out."""
    trajectory: Any = None
    """`decoding.trajectory.Trajectory`, where it was asked for."""

    def to_record(self) -> dict[str, Any]:
        """Everything but the trace and the trajectory, in JSON types."""
        return {
            "text": self.text,
            "tokens": self.tokens,
            "finish_reason": self.finish_reason,
            "stats": self.stats.to_record(),
        }

    def flat_record(self, *counts: str) -> dict[str, Any]:
        """One line of a table: text, reason and the named counts. `tokens` is their number here, not their ids."""
        record = self.to_record()
        chosen = {name: record["stats"][name] for name in counts}
        return {"text": record["text"], "finish_reason": record["finish_reason"], **chosen}
