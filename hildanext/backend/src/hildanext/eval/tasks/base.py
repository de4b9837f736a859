"""What a benchmark task is: items, what a model is asked, and how its answer is judged.

A task is its own frozen configuration and knows no model: it makes prompt strings (or pairs of texts to be scored) and
turns answers into scores. Who answers (`models.py`), in which order, and what is kept of it (`runner.py`) is shared, so
that a diffusion model and its parent see the very same string.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import Field

from hildanext.core.config import config
from hildanext.core.errors import ConfigError
from hildanext.eval.tasks.records import Records
from hildanext.likelihood.conditional import Pair, Scored


@dataclass(frozen=True)
class Item:
    """One example. `index` is its place in the data, whatever the limit."""

    index: int
    id: str
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """A column of the results. Its value is sum(value) / sum(weight) over the items, or exp of that."""

    name: str
    better: Literal["higher", "lower"] = "higher"
    percent: bool = True
    exp: bool = False


@dataclass(frozen=True)
class Judgement:
    """Scores by name; None for an answer that could not be judged, which is then left out and counted."""

    scores: Mapping[str, float | None]
    extraction: Mapping[str, Any] = field(default_factory=dict)
    """What was read out of the answer, for people who look at samples."""


Encode = Callable[[str], list[int]]
"""Token ids of a document's beginning: BOS where the tokenizer has one, then the text."""


@config
class Task:
    """What all tasks share: where the data are, and how values of an item become one."""

    metrics: ClassVar[tuple[Metric, ...]] = ()
    """The first is the one that pictures show."""
    hub: ClassVar[tuple[str, str | None]] = ("", None)
    """Data set and subset of the hub that are read where no `data` is named."""

    data: str | None = None
    """A file, a folder with a file per split, or a hub id; None is the public data set."""
    split: str = "test"

    def items(self, limit: int | None = None) -> list[Item]:
        """The first `limit` examples (None: all). Raises `DataError`."""
        raise NotImplementedError

    def records(self) -> list[Mapping[str, Any]]:
        """Everything that is read, worked examples included: a run goes on only while it says the same."""
        return [item.record for item in self.items()]

    def facts(self) -> dict[str, Any]:
        """What else a score depends on and its line must say (the isolation of a sandbox, for instance)."""
        return {}

    def left_out(self) -> int:
        """Rows of the data that could not be read, and so are no items."""
        records = getattr(self, "_records", None)
        return records.refused.total if isinstance(records, Records) else 0

    def absent(self) -> dict[str, str]:
        """Metrics that cannot be had here, and why: their column says so."""
        return {}

    def details(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """More about all samples of a model than its scores say."""
        return {}

    def values(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
        """Metric to (value, weight) of one item, from its samples (one unless `repeats` is more).

        The default is the mean over those that could be judged.
        """
        values: dict[str, tuple[float, float]] = {}
        for metric in self.metrics:
            scores = [sample["scores"].get(metric.name) for sample in samples]
            judged = [float(score) for score in scores if score is not None]
            if judged:
                values[metric.name] = (sum(judged) / len(judged), 1.0)
        return values


@config
class WritingTask(Task):
    """The model writes; what it wrote is judged."""

    stops: ClassVar[tuple[str, ...]] = ()
    """Where an answer ends, beside the end of text."""

    few_shot: int = Field(default=0, ge=0)
    """Worked examples before the question."""
    max_new_tokens: int = Field(default=256, ge=1)
    repeats: int = Field(default=1, ge=1)
    """Answers to each item; more than one needs a temperature."""
    temperature: float = Field(default=0.0, ge=0)
    top_p: float | None = None
    chat: bool = False
    """Say it in the tokenizer's chat template, as a user's message; without worked examples it is the bare question,
    which is how a model fine-tuned on conversations was asked. Where neither this nor `few_shot` is given, a checkpoint
    of `sft` is asked so (`runner.as_taught`)."""
    overlong: Literal["refuse", "fewer_shots"] = "refuse"
    """What happens to a prompt that does not fit the context beside `max_new_tokens`; for all models alike."""

    def __post_init__(self) -> None:
        if self.repeats > 1 and self.temperature <= 0:
            raise ConfigError(
                f"{self.repeats} greedy answers to an item are one answer",
                "give a temperature (0.2 for pass@1, 0.8 for more), or repeats 1",
            )

    def prompt(self, item: Item, shots: int) -> str:
        """What the model is given, after `shots` worked examples (at most `few_shot`)."""
        raise NotImplementedError

    def judge(self, item: Item, text: str) -> Judgement:
        """Read the answer out of `text` (cut at the first stop string) and score it."""
        raise NotImplementedError


@config
class ScoringTask(Task):
    """Nothing is written: the model says how likely given texts are."""

    block_sizes: tuple[int | None, ...] = (1, None)
    """Block sizes of the diffusion model: exact at 1, a bound at a larger one; None is the checkpoint's own."""
    draws: int = Field(default=16, ge=2)
    """Random masks of a block behind each bound, shared by the texts of one item."""

    def __post_init__(self) -> None:
        if not self.block_sizes or min(size if size is not None else 1 for size in self.block_sizes) < 1:
            raise ConfigError(
                f"block_sizes {self.block_sizes}", "give sizes of at least 1, or null for the model's own"
            )

    def prompt(self, item: Item) -> str:
        """What is given before the scored text, as samples keep it."""
        raise NotImplementedError

    def pairs(self, item: Item, encode: Encode, seed: int) -> list[Pair]:
        """What is scored for an item. `encode` adds the BOS."""
        raise NotImplementedError

    def weigh(self, item: Item, scored: Sequence[Scored]) -> Judgement:
        """Scores of an item from the nats of its pairs, in their order."""
        raise NotImplementedError


def split_at(encode: Encode, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a context and of what follows it, cut where lm-evaluation-harness cuts.

    Trailing spaces of the context belong to the continuation, so that a word keeps its usual token.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    before = encode(stripped)
    return before, encode(stripped + continuation)[len(before) :]
