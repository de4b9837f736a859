"""What a person sees while something long runs: one live line in a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

LINES_EVERY_SECONDS = 20.0


class ProgressLine:
    """How much of `total` is done, what the caller says about it, and the time left at this session's pace.

    `done` units were done by earlier sessions: they count for the bar and not for the pace. What is done between units
    now and then (an evaluation) is a break: `breaks_left` are to come, and take as long as those so far.
    """

    def __init__(self, total: int, unit: str, name: str = "", done: int = 0, quiet: bool = False) -> None:
        self.total, self.unit, self.name, self.done = total, unit, name, done
        self.console = Console(stderr=True, quiet=quiet)
        self.live = self.console.is_terminal and not quiet
        self.start_time, self.start_done, self.tokens = time.monotonic(), done, 0
        self.last_line = float("-inf")  # the first one comes at once
        self.breaks: list[float] = []
        self.breaks_left = 0
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            disable=not self.live,
        )
        self.row = self.bar.add_task(name or "starting", total=total, completed=done, left="")

    def __enter__(self) -> "ProgressLine":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def update(self, done: int, text: str) -> None:
        """So much is done by now."""
        self.done = done
        title = f"{self.name} | {text}" if self.name else text
        now, left = time.monotonic(), self._left()
        self.bar.update(self.row, completed=done, description=title, left=left)
        if not self.live and (now - self.last_line > LINES_EVERY_SECONDS or done >= self.total):
            self.last_line = now
            self.say(f"{done} of {self.total} {self.unit} | {title} | {left}")

    def _left(self) -> str:
        """The time to the end, as far as it is known."""
        working = time.monotonic() - self.start_time - sum(self.breaks)
        seconds = working / max(self.done - self.start_done, 1) * max(self.total - self.done, 0)
        if self.breaks:
            seconds += sum(self.breaks) / len(self.breaks) * self.breaks_left
        unknown = self.breaks_left if not self.breaks else 0
        more = f" and {unknown} evaluation{'s' * (unknown != 1)}" if unknown else ""
        return f"{duration(seconds)}{more} left"

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """A break between units, whose time is not theirs."""
        begun = time.monotonic()
        yield
        self.breaks.append(time.monotonic() - begun)

    def advance(self, tokens: int) -> None:
        """One unit more, which came to so many tokens."""
        self.tokens += tokens
        rate = self.tokens / max(time.monotonic() - self.start_time, 1e-9)
        self.update(self.done + 1, f"{rate:.0f} tokens/s")

    def say(self, text: str) -> None:
        """A line of its own, above the live one."""
        # A sample may hold brackets; and a line that is cut in a file at the width of no terminal helps nobody.
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds up to two minutes, then minutes, then hours and minutes."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def time_left(seconds: float) -> str:
    """How long something will still take, to stand behind what is done; nothing where that is a minute or less."""
    return f", {duration(seconds)} left" if seconds > 60 else ""


class InputShare:
    """How long the rest of an input will take, from the share of it that is read. Says so after a few seconds, and
    then once a minute, where more than a minute is left."""

    FIRST, EVERY = 5.0, 60.0

    def __init__(self, say: Callable[[str], None] | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.say, self.clock = say, clock
        self.begun, self.start, self.next = clock(), 0.0, 0.0
        self.share = 0.0

    def reached(self, share: float) -> None:
        """So much is read; less than before is another input, and the pace is measured anew."""
        now = self.clock()
        if share < self.share or self.next == 0.0:
            self.begun, self.start, self.next = now, share, now + self.FIRST
        self.share = share
        if now >= self.next:
            self.next = now + self.EVERY
            left = self.left()
            if self.say is not None and left:
                self.say(f"{share:.0%} read{left}")

    def left(self) -> str:
        """The time left in words; nothing where it is a minute or less, or not known yet."""
        done = self.share - self.start
        return time_left((self.clock() - self.begun) / done * (1.0 - self.share)) if done > 0 else ""


class Repeats:
    """Says which of `count` repeats is done, and how long the others will take."""

    def __init__(self, count: int, say: Callable[[str], None] | None) -> None:
        self.count, self.say, self.begun = count, say, time.perf_counter()

    def done(self, number: int) -> None:
        """The repeat `number`, from 1, is done."""
        if self.say is not None:
            left = (time.perf_counter() - self.begun) / number * (self.count - number)
            self.say(f"repeat {number} of {self.count}{time_left(left)}")
