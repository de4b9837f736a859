"""GSM8K: grade-school word problems, answered in words and judged by the number they end with."""

import random
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

from pydantic import Field

from hildanext.core.config import config
from hildanext.core.errors import ConfigError
from hildanext.eval.tasks.base import Item, Judgement, Metric, WritingTask
from hildanext.eval.tasks.rows import Row, beside, read_rows, text_of
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
    few_shot_seed: int = HARNESS_SEED

    @cached_property
    def _rows(self) -> list[Row]:
        name, subset = self.hub
        return read_rows(self.data if self.data is not None else name, self.split, subset)

    @cached_property
    def _examples(self) -> list[Row]:
        name, subset = self.hub
        place = self.few_shot_data
        if place is None:
            place = beside(self.data, "train") if self.data is not None else name
        rows = read_rows(place, "train", subset)
        if len(rows) < self.few_shot:
            raise ConfigError(f"gsm8k: {self.few_shot} worked examples of {len(rows)}", "lower few_shot")
        return rows

    def items(self, limit: int | None = None) -> list[Item]:
        found = [Item(index, f"gsm8k-{self.split}-{index}", row) for index, row in enumerate(self._rows[:limit])]
        for item in found:
            text_of(item.row, "question", item.id)
            gold_answer(text_of(item.row, "answer", item.id))
        return found

    def rows(self) -> list[Mapping[str, Any]]:
        return [*super().rows(), *(self._examples if self.few_shot else [])]

    def prompt(self, item: Item, shots: int) -> str:
        if self.chat and not self.few_shot:
            return str(item.row["question"])
        chosen = [self._examples[index] for index in self._drawn[item.index][:shots]] if shots else []
        parts = [f"{_question(row)} {row['answer']}" for row in chosen]
        return "\n\n".join([*parts, _question(item.row)])

    def judge(self, item: Item, text: str) -> Judgement:
        gold = gold_answer(item.row["answer"])
        return Judgement({name: float(RULES[name](text, gold)) for name in REPORTED}, {"gold": gold})

    @cached_property
    def _drawn(self) -> list[list[int]]:
        """Which examples each item is shown: the harness's one generator, advanced item by item."""
        generator, pool = random.Random(self.few_shot_seed), range(len(self._examples))
        return [generator.sample(pool, self.few_shot) for _ in self._rows]


def _question(row: Row) -> str:
    return f"Question: {row['question']}\nAnswer:"
