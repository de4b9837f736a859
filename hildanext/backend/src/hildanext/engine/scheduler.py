"""Whose turn it is: a bounded queue, a number of places, and turns of a few blocks where others wait.

First come, first served; a request that has had its turn while others wait goes to the end of the queue with all it
has written, and goes on where it was when its turn comes again. So a long one cannot starve short ones, nor many short
ones a long one. Knows no model: of a request it asks only what `Schedulable` holds.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar

from hildanext.engine.base import Overloaded


class Admission(Enum):
    """What may be done with the next request in the queue."""

    GO = "go"
    LATER = "later"
    """Let others pass: what it waits for comes soon."""
    STOP = "stop"
    """Nobody passes: else a large request would wait for ever."""


@dataclass(eq=False)
class Schedulable:
    """A request as the scheduler sees it."""

    blocks: int = 0
    """Blocks since its turn began."""
    begun: bool = False
    """It had a turn before: it holds memory, and its place in the queue is not counted."""


Item = TypeVar("Item", bound=Schedulable)


@dataclass
class Scheduler(Generic[Item]):
    """`slots` requests at a time, `queue` more that wait; `quantum` blocks a turn."""

    slots: int
    queue: int
    quantum: int
    waiting: deque[Item] = field(default_factory=deque)
    running: list[Item] = field(default_factory=list)

    def enqueue(self, *items: Item) -> None:
        """Queue new requests, all or none. Raises `Overloaded` where the queue has no place for them."""
        fresh = sum(not other.begun for other in self.waiting)
        free = self.slots - len(self.running) - (len(self.waiting) - fresh)
        if fresh + len(items) > self.queue + max(free, 0):
            raise Overloaded(
                f"{fresh} requests are waiting and the queue holds {self.queue}", "try again in a moment", 1.0
            )
        self.waiting.extend(items)

    def preempt(self) -> list[Item]:
        """Running requests whose turn is over, as many as others wait for; they go to the end of the queue."""
        free = self.slots - len(self.running)
        over = [item for item in self.running if item.blocks >= self.quantum]
        over = sorted(over, key=lambda item: -item.blocks)[: max(len(self.waiting) - free, 0)]
        for item in over:
            self.running.remove(item)
            self.waiting.append(item)
        return over

    def admit(self, judge: Callable[[Item], Admission]) -> Item | None:
        """The next request whose turn begins; None where there is no place or nobody may have it."""
        if len(self.running) >= self.slots:
            return None
        stopped = False
        for item in self.waiting:
            # What began already needs no more memory, and frees some when it ends.
            verdict = Admission.GO if item.begun else Admission.STOP if stopped else judge(item)
            stopped = stopped or verdict is Admission.STOP
            if verdict is Admission.GO:
                self.waiting.remove(item)
                item.blocks, item.begun = 0, True
                self.running.append(item)
                return item
        return None

    def remove(self, item: Item) -> None:
        """The request has ended."""
        if item in self.running:
            self.running.remove(item)
        elif item in self.waiting:
            self.waiting.remove(item)
