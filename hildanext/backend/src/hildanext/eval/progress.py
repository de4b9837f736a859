"""What a person sees while a task runs: a bar in a terminal, a line now and then elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES_EVERY_SECONDS = 20.0


class TaskProgress:
    """Items done, tokens per second since this session began, and the time left."""

    def __init__(self, name: str, total: int, quiet: bool = False) -> None:
        self.name, self.total, self.done, self.fresh, self.tokens = name, total, 0, 0, 0
        self.quiet = quiet
        self.console = Console(stderr=True)
        self.live = self.console.is_terminal and not quiet
        self.begun = self.last = time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=self.console, disable=not self.live)
        self.row = self.bar.add_task(name, total=total)

    def __enter__(self) -> "TaskProgress":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def skip(self, count: int) -> None:
        """Items that an earlier session has done."""
        self.done += count
        self.bar.update(self.row, completed=self.done)
        if count and not self.quiet:
            self.bar.console.print(f"{self.name}: {count} of {self.total} are there already", highlight=False)

    def advance(self, tokens: int) -> None:
        self.done, self.fresh, self.tokens = self.done + 1, self.fresh + 1, self.tokens + tokens
        now = time.monotonic()
        rate = self.tokens / max(now - self.begun, 1e-9)
        self.bar.update(self.row, completed=self.done, description=f"{self.name} | {rate:.0f} tokens/s")
        if self.live or self.quiet:
            return
        if now - self.last > LINES_EVERY_SECONDS or self.done == self.total:
            self.last = now
            left = (now - self.begun) / self.fresh * (self.total - self.done)
            line = f"{self.name}: {self.done} of {self.total}, {rate:.0f} tokens/s, {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)
