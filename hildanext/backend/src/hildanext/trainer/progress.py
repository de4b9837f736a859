"""What a person sees while a run trains: one live line in a terminal, a line now and then elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

LINES_EVERY_SECONDS = 20.0


class TrainingProgress:
    """Loss, masked accuracy, tokens/s, phase, block size and the time left."""

    def __init__(self, total_tokens: int, done_tokens: int = 0, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.total = total_tokens
        self.live = sys.stderr.isatty() and not quiet
        self.last = 0.0
        self.started, self.start_tokens = time.monotonic(), done_tokens
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.live,
        )
        self.task = self.bar.add_task("starting", total=total_tokens, completed=done_tokens)

    def __enter__(self) -> "TrainingProgress":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def update(
        self, tokens: int, phase: str, block_size: int, loss: float, accuracy: float, tokens_per_second: float
    ) -> None:
        text = (
            f"{phase} block {block_size} | loss {loss:.3f} | masked acc {accuracy:.1%} | {tokens_per_second:.0f} tok/s"
        )
        self.bar.update(self.task, completed=tokens, description=text)
        now = time.monotonic()
        if not self.live and (now - self.last > LINES_EVERY_SECONDS or tokens >= self.total):
            self.last = now
            done = max(tokens - self.start_tokens, 1)
            left = (now - self.started) / done * max(self.total - tokens, 0)
            self.console.print(f"{tokens}/{self.total} tokens | {text} | {left:.0f} s left", highlight=False)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)  # a sample may hold brackets
