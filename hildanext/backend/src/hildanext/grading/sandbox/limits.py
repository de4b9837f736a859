"""How much a program may use, and what came of it."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from hildanext.core.config import config, plain

Kind = Literal["passed", "failed", "timeout", "memory", "crashed", "protocol_error", "sandbox_error"]


@config
class Limits:
    """What one program may use. Sizes are in bytes."""

    seconds: float = Field(default=3.0, gt=0)
    """Wall clock for loading the program and all calls together; human-eval's default."""
    memory_bytes: int = Field(default=512 << 20, ge=64 << 20)
    """Address space, so a little more than what a program can fill."""
    stack_bytes: int = Field(default=64 << 20, ge=1 << 20)
    file_bytes: int = Field(default=1 << 20, ge=0)
    message_bytes: int = Field(default=1 << 20, ge=1 << 10)
    """The longest value that may be returned, as text."""
    open_files: int = Field(default=32, ge=16)
    processes: int = Field(default=64, ge=1)
    """Threads and, where no filter on system calls forbids them, processes. Only where the user is the worker's own."""

    def settings(self) -> dict[str, Any]:
        """What the processes are told, with the processor time that goes with the wall clock."""
        return {**plain(self), "cpu_seconds": math.ceil(self.seconds) + 1}


@dataclass(frozen=True)
class Job:
    """A program and the test it must pass.

    `program` is all that the worker gets. The checker runs `setup` (imports, helper functions of the task) and `test`,
    which defines `check(candidate)`; then it calls `check` with a stub for the program's `entry_point`.
    """

    program: str
    entry_point: str
    test: str
    setup: str = ""


@dataclass(frozen=True)
class Verdict:
    """What came of a job. `sandbox_error` says nothing about the program; all others but `passed` are its fault."""

    kind: Kind
    detail: str = ""
    seconds: float = 0.0
    """Wall clock from loading to the verdict."""
    calls: int = 0

    @property
    def passed(self) -> bool:
        return self.kind == "passed"
