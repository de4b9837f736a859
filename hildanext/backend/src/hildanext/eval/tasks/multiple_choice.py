"""Multiple choice by likelihood, as for MMLU: the option that the model finds most likely is its answer."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import Field

from hildanext.core.config import config
from hildanext.core.errors import ConfigError, DataError
from hildanext.eval.tasks.base import Encode, Item, Judgement, Metric, ScoringTask, split_at
from hildanext.eval.tasks.records import Record, Records, beside, read_records, text_of
from hildanext.likelihood.conditional import Pair, Scored

LETTERS = "ABCDEFGHIJ"
MMLU_COLUMNS = ("question", "a", "b", "c", "d", "answer")
"""MMLU's own CSV files have no header."""


@config
class MultipleChoice(ScoringTask):
    """`acc`: the option with the highest log-likelihood; `acc_norm`: per byte of its text, as long options cost more.

    Only an option's tokens are summed; the question is visible. Options of one question share their random masks, so
    that noise common to them cancels. `letters` lists the options and scores " A", " B", ... (MMLU: one token each,
    hence no randomness); `text` scores the options' texts themselves (as HellaSwag and ARC do). Rows have `question`,
    `choices` (or the columns A, B, C, D) and `answer` (index, letter or the text), and may have `subject`.

    Paper: MMLU, arXiv:2009.03300; the prompt is lm-evaluation-harness's.
    Differs: under a diffusion model at a block size above 1 a likelihood is a bound.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (Metric("acc"), Metric("acc_norm"))
    hub: ClassVar[tuple[str, str | None]] = ("cais/mmlu", "all")

    style: Literal["letters", "text"] = "letters"
    few_shot: int = Field(default=0, ge=0)
    """Worked examples of the same subject, the first ones of `few_shot_data`."""
    few_shot_data: str | None = None
    """Where they come from; None is the `dev` split beside the data."""

    @cached_property
    def _records(self) -> Records:
        name, subset = self.hub
        return read_records(self.data if self.data is not None else name, self.split, subset, MMLU_COLUMNS)

    @cached_property
    def _examples(self) -> list[Record]:
        name, subset = self.hub
        place = self.few_shot_data
        if place is None:
            place = beside(self.data, "dev") if self.data is not None else name
        records = read_records(place, "dev", subset, MMLU_COLUMNS)
        return [_checked(record, f"worked example {number}") for number, record in enumerate(records)]

    def items(self, limit: int | None = None) -> list[Item]:
        records = enumerate(self._records[:limit])
        return [Item(index, f"choice-{index}", _checked(record, f"question {index}")) for index, record in records]

    def records(self) -> list[Mapping[str, Any]]:
        return [*super().records(), *(self._examples if self.few_shot else [])]

    def prompt(self, item: Item) -> str:
        subject = str(item.record.get("subject", "")).replace("_", " ")
        about = f" about {subject}" if subject else ""
        head = f"The following are multiple choice questions (with answers){about}.\n\n"
        shown = [f"{self._asked(record)} {self._right(record)}\n\n" for record in self._shots(item)]
        return head + "".join(shown) + self._asked(item.record)

    def pairs(self, item: Item, encode: Encode, seed: int) -> list[Pair]:
        prompt = self.prompt(item)
        pairs = []
        for option in self._options(item.record):
            context, continuation = split_at(encode, prompt, f" {option}")
            if not continuation:
                raise DataError(f"{item.id}: the option {option!r} has no tokens", "mend the data")
            pairs.append(Pair(tuple(context), tuple(continuation), seed))
        return pairs

    def weigh(self, item: Item, scored: Sequence[Scored]) -> Judgement:
        options = self._options(item.record)
        nats = [score.nats for score in scored]
        per_byte = [value / len(f" {option}".encode()) for value, option in zip(nats, options, strict=True)]
        picked = {"acc": nats.index(min(nats)), "acc_norm": per_byte.index(min(per_byte))}
        gold = int(item.record["gold"])
        extraction: dict[str, Any] = {
            "nats": nats,
            "kinds": [score.kind for score in scored],
            "picked": picked["acc"],
            "gold": gold,
        }
        return Judgement({name: float(choice == gold) for name, choice in picked.items()}, extraction)

    def _shots(self, item: Item) -> list[Record]:
        if self.few_shot == 0:
            return []
        subject = item.record.get("subject")
        records = [record for record in self._examples if record.get("subject") == subject][: self.few_shot]
        if len(records) < self.few_shot:
            raise ConfigError(f"{len(records)} worked examples for the subject {subject!r}", "lower few_shot")
        return records

    def _asked(self, record: Any) -> str:
        if self.style == "text":
            return f"Question: {str(record['question']).strip()}\nAnswer:"
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, record["choices"], strict=False))
        return f"{str(record['question']).strip()}\n{listed}\nAnswer:"

    def _options(self, record: Any) -> list[str]:
        return list(record["choices"]) if self.style == "text" else list(LETTERS[: len(record["choices"])])

    def _right(self, record: Any) -> str:
        return self._options(record)[int(record["gold"])]


def _checked(record: Record, where: str) -> Record:
    """The record with `choices` as a list and `gold` as an index. Raises `DataError`."""
    text_of(record, "question", where)
    choices = record.get("choices")
    if choices is None:
        lower = {str(key).lower(): value for key, value in record.items()}
        choices = [lower[letter] for letter in LETTERS.lower() if letter in lower]
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise DataError(f"{where} has no choices", "give 'choices' (a list of 2 to 10 texts) or the columns A, B, C, D")
    choices = [str(choice) for choice in choices]
    return {**record, "choices": choices, "gold": _gold(record.get("answer"), choices, where)}


def _gold(answer: Any, choices: Sequence[str], where: str) -> int:
    text = str(answer).strip()
    if text in choices and not isinstance(answer, int):
        return list(choices).index(text)
    if len(text) == 1 and text.upper() in LETTERS[: len(choices)]:
        return LETTERS.index(text.upper())
    if text.isdigit() and int(text) < len(choices):
        return int(text)
    raise DataError(f"{where} has the answer {answer!r}", f"give an index from 0, a letter, or one of {choices}")
