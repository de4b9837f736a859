"""Ctrl-C between steps, never inside one, so that what is saved is whole."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType


class Interrupt:
    """Whether someone asked the run to stop."""

    asked = False


@contextlib.contextmanager
def between_steps() -> Iterator[Interrupt]:
    """Within the context the first Ctrl-C (or SIGTERM) only sets a flag; a second one interrupts at once."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt  # signals reach the main thread alone
        return

    def note(number: int, frame: FrameType | None) -> None:
        if interrupt.asked:
            raise KeyboardInterrupt
        interrupt.asked = True
        print("stopping after this step; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
