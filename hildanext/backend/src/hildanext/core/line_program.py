"""A program of one's own that answers a line with a line, for work that may take for ever or all memory: it is killed.

A signal would be heard on the main thread alone, and not while one long operation of the interpreter runs.
"""

import subprocess
import sys
import threading
import weakref
from pathlib import Path

READY = "ready\n"


class LineProgram:
    """`program` is run as a file and says "ready" once it can answer. It starts with the first question, and anew
    after one that it did not survive. Any thread may ask; one question is answered after the other."""

    def __init__(self, program: Path, start_seconds: float) -> None:
        self.program, self.start_seconds = program, start_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def ask(self, question: str, seconds: float) -> str | None:
        """The answer; None where the program died of the question, or was killed after so many seconds.

        Raises `OSError` where it cannot be started.
        """
        with self._lock:
            process = self._process if self._process is not None else self._start()
            line = ""
            try:
                line = self._next_line(process, question + "\n", seconds)
            finally:
                if not line.endswith("\n"):  # after Ctrl-C too: the next question would be given this one's answer
                    self._process = None
                    self._forget()
        return line if line.endswith("\n") else None

    def _start(self) -> "subprocess.Popen[str]":
        # -P: the folder of the program, whose files have common names, is no place to import from.
        process = subprocess.Popen(
            [sys.executable, "-P", str(self.program)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="ascii",
            # A terminal's Ctrl-C is for the program that asks.
            start_new_session=True, creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )  # fmt: skip
        self._forget = weakref.finalize(self, _end, process)
        if self._next_line(process, "", self.start_seconds) != READY:
            self._forget()
            raise OSError(f"{self.program.name} does not start")
        self._process = process
        return process

    @staticmethod
    def _next_line(process: "subprocess.Popen[str]", question: str, seconds: float) -> str:
        assert process.stdin is not None and process.stdout is not None
        clock = threading.Timer(seconds, process.kill)
        clock.start()
        try:
            process.stdin.write(question)
            process.stdin.flush()
            return process.stdout.readline()
        except BrokenPipeError:
            return ""
        finally:
            clock.cancel()


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()
