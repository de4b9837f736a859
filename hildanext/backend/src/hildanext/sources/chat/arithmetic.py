"""Small sums in words, made on the spot: a task that a model of a few million parameters can learn in minutes."""

from collections.abc import Iterator

import numpy as np
from pydantic import Field

from hildanext.config import knobs
from hildanext.sources.base import Report
from hildanext.sources.chat.base import ChatSource, Record

NAMES = ("Lily", "Tom", "Ben", "Mia", "Sam", "Anna", "Max", "Sue")
THINGS = ("apples", "toys", "books", "cars", "balls", "dolls", "cookies", "flowers")


@knobs
class Arithmetic(ChatSource):
    """Stories of `steps` additions and subtractions; the answer writes every equation, then `#### result`.

    `Lily has 5 apples. She gets 3 more. Then she gives away 2. How many apples does Lily have?` is answered by
    `5+3=8`, `8-2=6`, `#### 6`, a line each. Example i depends on (seed, i) alone. Each result is the next equation's
    first operand, so that a graph of causes can be read off the answer.
    """

    count: int = Field(default=2000, ge=1)
    largest: int = Field(default=9, ge=2)
    """Operands and results lie in 0 to this."""
    steps: int = Field(default=2, ge=1, le=8)
    seed: int = Field(default=0, ge=0)

    def records(self, report: Report) -> Iterator[Record]:
        for number in range(self.count):
            yield Record(self._record(number), f"sum {number + 1}")

    def _record(self, number: int) -> dict[str, str]:
        draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, number])))
        name, thing = NAMES[int(draw.integers(len(NAMES)))], THINGS[int(draw.integers(len(THINGS)))]
        value = int(draw.integers(1, self.largest))
        story, lines = [f"{name} has {value} {thing}."], []
        for step in range(self.steps):
            change = int(draw.integers(-value, self.largest - value + 1)) or (1 if value < self.largest else -1)
            after = value + change
            then = "Then" if step else "Now"
            story.append(f"{then} {name} {'gets' if change > 0 else 'gives away'} {abs(change)} {thing}.")
            lines.append(f"{value}{'+' if change > 0 else '-'}{abs(change)}={after}")
            value = after
        question = " ".join([*story, f"How many {thing} does {name} have?"])
        return {"prompt": question, "response": "\n".join([*lines, f"#### {value}"])}
