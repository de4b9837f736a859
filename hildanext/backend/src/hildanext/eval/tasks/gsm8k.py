"""GSM8K: grade-school word problems, answered in words and judged by the number they end with."""

import random
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

from pydantic import Field

from hildanext.core.config import Seed, config
from hildanext.core.errors import ConfigError
from hildanext.eval.tasks.base import Item, Judgement, Metric, WritingTask
from hildanext.eval.tasks.records import Record, Records, beside, read_records, text_of
from hildanext.grading.gsm8k import RULES, gold_answer

REPORTED = ("strict", "flexible", "official", "canonical")
HARNESS_SEED = 1234
"""lm-evaluation-harness's default seed for worked examples."""


@config
class Gsm8k(WritingTask):
    """Exact match under four rules, prompted as lm-evaluation-harness does.

    Prompts, separators, worked examples (drawn anew for each question with the harness's own generator and seed) and
    stop strings are those of its `gsm8k` task (version 3), character for character. `strict` and `flexible` are its
    filters, `official` is the data set's own rule, `canonical` ours.

    Paper: GSM8K, arXiv:2110.14168.
    Differs: the prompt begins with the tokenizer's BOS, where it has one; with `chat` and no examples it is the bare
    question.
    """

    metrics: ClassVar[tuple[Metric, ...]] = tuple(Metric(name) for name in REPORTED)
    hub: ClassVar[tuple[str, str | None]] = ("openai/gsm8k", "main")
    stops: ClassVar[tuple[str, ...]] = ("Question:", "</s>", "<|im_end|>")

    few_shot: int = Field(default=5, ge=0)
    few_shot_data: str | None = None
    """Where worked examples come from; None is the `train` split beside the data."""
    few_shot_seed: Seed = HARNESS_SEED

    @cached_property
    def _records(self) -> Records:
        name, subset = self.hub
        return read_records(self.data if self.data is not None else name, self.split, subset)

    @cached_property
    def _examples(self) -> list[Record]:
        name, subset = self.hub
        place = self.few_shot_data
        if place is None:
            place = beside(self.data, "train") if self.data is not None else name
        records = read_records(place, "train", subset)
        if len(records) < self.few_shot:
            raise ConfigError(f"gsm8k: {self.few_shot} worked examples of {len(records)}", "lower few_shot")
        return records

    def items(self, limit: int | None = None) -> list[Item]:
        records = enumerate(self._records[:limit])
        items = [Item(index, f"gsm8k-{self.split}-{index}", record) for index, record in records]
        for item in items:
            text_of(item.record, "question", item.id)
            gold_answer(text_of(item.record, "answer", item.id))
        return items

    def records(self) -> list[Mapping[str, Any]]:
        return [*super().records(), *(self._examples if self.few_shot else [])]

    def prompt(self, item: Item, shots: int) -> str:
        if self.chat and not self.few_shot:
            return str(item.record["question"])
        chosen = [self._examples[index] for index in self._drawn[item.index][:shots]] if shots else []
        parts = [f"{_question(record)} {record['answer']}" for record in chosen]
        return "\n\n".join([*parts, _question(item.record)])

    def judge(self, item: Item, text: str) -> Judgement:
        gold = gold_answer(item.record["answer"])
        return Judgement({name: float(RULES[name](text, gold)) for name in REPORTED}, {"gold": gold})

    @cached_property
    def _drawn(self) -> list[list[int]]:
        """Which examples each item is shown: the harness's one generator, advanced item by item."""
        generator, pool = random.Random(self.few_shot_seed), range(len(self._examples))
        return [generator.sample(pool, self.few_shot) for _ in self._records]


def _question(record: Record) -> str:
    return f"Question: {record['question']}\nAnswer:"
