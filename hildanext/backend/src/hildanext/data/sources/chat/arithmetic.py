"""Small sums in words, made on the spot: a task that a model of a few million parameters can learn in minutes."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from pydantic import Field

from hildanext.core.config import Seed, config
from hildanext.data.sources.base import Report
from hildanext.data.sources.chat.base import ChatSource, Record

NAMES = ("Lily", "Tom", "Ben", "Mia", "Sam", "Anna", "Max", "Sue")
THINGS = ("apples", "toys", "books", "cars", "balls", "dolls", "cookies", "flowers")


@config
class Arithmetic(ChatSource):
    """Stories of `steps` additions and subtractions; the answer writes every equation, then `#### result`.

    `Lily has 5 apples. She gets 3 more. Then she gives away 2. How many apples does Lily have?` is answered by
    `5+3=8`, `8-2=6`, `#### 6`, a line each. Example i depends on (seed, i) alone. Each result is the next equation's
    first operand. The causal graph is exact: two operands to each result, at every place where they are written.
    """

    count: int = Field(default=2000, ge=1)
    largest: int = Field(default=9, ge=2)
    """Operands and results lie in 0 to this."""
    steps: int = Field(default=2, ge=1, le=8)
    seed: Seed = 0
    wrong: float = Field(default=0.0, ge=0, le=1)
    """Share of examples whose last result is one off: a poor teacher, for a model that has something left to learn
    from a reward."""

    def records(self, report: Report) -> Iterator[Record]:
        for number in range(self.count):
            yield Record(self._record(number), f"sum {number + 1}")

    def _record(self, number: int) -> dict[str, Any]:
        draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, number])))
        name, thing = NAMES[int(draw.integers(len(NAMES)))], THINGS[int(draw.integers(len(THINGS)))]
        value = int(draw.integers(1, self.largest))
        story, answer, held = _Writer("prompt"), _Writer("response"), "q0"
        story.write(f"{name} has ").number(held, value).write(f" {thing}.")
        edges = []
        for step in range(self.steps):
            change = int(draw.integers(-value, self.largest - value + 1)) or (1 if value < self.largest else -1)
            operand, result = f"q{step + 1}", f"e{step}"
            story.write(f" {'Then' if step else 'Now'} {name} {'gets' if change > 0 else 'gives away'} ")
            story.number(operand, abs(change)).write(f" {thing}.")
            answer.number(held, value).write("+" if change > 0 else "-").number(operand, abs(change)).write("=")
            value += change
            if step + 1 == self.steps and self.wrong > 0 and draw.random() < self.wrong:
                value += 1 if value == 0 or draw.random() < 0.5 else -1
            answer.number(result, value).write("\n")
            edges += [(held, result, "operand"), (operand, result, "operand")]
            held = result
        story.write(f" How many {thing} does {name} have?")
        answer.write("#### ").number("f", value)
        edges.append((held, "f", "copy"))
        graph = {"version": 1, "source": "arithmetic", "nodes": _nodes(story, answer), "edges": _edges(edges)}
        return {"prompt": story.text, "response": answer.text, "causal_graph": graph}


class _Writer:
    """A text in the making, and where its numbers stand."""

    def __init__(self, field: str) -> None:
        self.field, self.text = field, ""
        self.spans: dict[str, list[list[Any]]] = {}
        self.values: dict[str, str] = {}

    def write(self, text: str) -> "_Writer":
        self.text += text
        return self

    def number(self, node: str, value: int) -> "_Writer":
        begin = len(self.text)
        self.values[node] = str(value)
        self.write(self.values[node])
        self.spans.setdefault(node, []).append([self.field, begin, len(self.text)])
        return self


def _nodes(story: _Writer, answer: _Writer) -> list[dict[str, Any]]:
    """Every number once, at all its places: in the story, where it is computed, and where an equation repeats it."""
    kinds = {"q": "given", "e": "intermediate", "f": "final"}
    values = {**story.values, **answer.values}
    places = {node: [*story.spans.get(node, []), *answer.spans.get(node, [])] for node in values}
    return [{"id": node, "kind": kinds[node[0]], "value": values[node], "spans": places[node]} for node in values]


def _edges(edges: list[tuple[str, str, str]]) -> list[dict[str, Any]]:
    return [{"from": cause, "to": effect, "kind": kind} for cause, effect, kind in edges]
