"""Perplexity of held-out stories, story by story: exact where that is possible, a bound elsewhere."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from pydantic import Field

from hildanext.core.config import config
from hildanext.core.errors import DataError
from hildanext.core.run_dir import expand_home
from hildanext.data.sources import SOURCES, Report
from hildanext.eval.tasks.base import Encode, Item, Judgement, Metric, ScoringTask
from hildanext.eval.tasks.records import read_records
from hildanext.likelihood.conditional import Pair, Scored


@config
class TinyStories(ScoringTask):
    """Nats per token and perplexity of whole texts, each read from its own beginning.

    The first token is given (BOS where the tokenizer has one), the rest is scored, at most `max_tokens` of it. The same
    tokens for every model; a bound is named as one, and `mask_se` in the samples is the error its random masks leave.
    Perplexities compare within one tokenizer only.

    Paper: TinyStories, arXiv:2305.07759.
    Differs: any text file serves whose texts are parted by `<|endoftext|>` lines, and JSON lines with `text`.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("perplexity", "lower", percent=False, exp=True),
        Metric("nats/token", "lower", percent=False),
    )
    hub: ClassVar[tuple[str, str | None]] = ("roneneldan/TinyStories", None)

    split: str = "validation"
    max_tokens: int = Field(default=256, ge=2)

    @cached_property
    def _texts(self) -> list[str]:
        place = self.data if self.data is not None else self.hub[0]
        if expand_home(place).suffix == ".txt":
            source = SOURCES["tinystories"](path=place)  # type: ignore[call-arg]
            texts = [document.text for document in source.documents(report=Report())]
        else:
            texts = [str(record.get("text", "")) for record in read_records(place, self.split, self.hub[1])]
        texts = [text for text in texts if text.strip()]
        if not texts:
            raise DataError(f"{place!r} holds no text", "give texts parted by <|endoftext|> lines, or rows with 'text'")
        return texts

    def items(self, limit: int | None = None) -> list[Item]:
        return [Item(index, f"story-{index}", {"text": text}) for index, text in enumerate(self._texts[:limit])]

    def prompt(self, item: Item) -> str:
        return ""

    def pairs(self, item: Item, encode: Encode, seed: int) -> list[Pair]:
        ids = encode(str(item.record["text"]))[: self.max_tokens + 1]
        return [Pair(tuple(ids[:1]), tuple(ids[1:]), seed)]

    def weigh(self, item: Item, scored: Sequence[Scored]) -> Judgement:
        (scored_text,) = scored
        extraction = {"tokens": scored_text.tokens, "kind": scored_text.kind, "mask_se": scored_text.se}
        return Judgement({"nats": scored_text.nats}, extraction)

    def details(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        tokens = sum(sample["extraction"]["tokens"] for sample in samples)
        squares = sum(sample["extraction"]["mask_se"] ** 2 for sample in samples)
        return {"se_of_masks_in_nats": squares**0.5 / max(tokens, 1)}

    def values(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
        (sample,) = samples
        value = (float(sample["scores"]["nats"]), float(sample["extraction"]["tokens"]))
        return {metric.name: value for metric in self.metrics}
