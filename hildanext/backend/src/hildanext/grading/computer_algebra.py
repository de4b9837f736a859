"""Is a formula the answer? math-verify's verdict, which simplifies with sympy, from a program of its own.

A model's answer may take for ever (`10000000000!`) or all memory. Math-verify's clocks are signals, so they work on the
main thread alone, not on Windows, and not while one long operation of the interpreter runs: a process can be killed.
"""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import threading
import weakref
from pathlib import Path

from hildanext.core.errors import ConfigError
from hildanext.grading.math_answers import LONGEST

PACKAGE = "math-verify"
WORKER = Path(__file__).with_name("math_verify_worker.py")
START_SECONDS = 120.0
"""For sympy to be imported, on a machine that does other work."""
ANSWER_SECONDS = 10.0


def installed_version() -> str | None:
    """Of math-verify; None where it is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        return None
    return importlib.metadata.version(PACKAGE)


class ComputerAlgebra:
    """Grades one answer after another. Its program starts with the first, and anew after one that took too long."""

    def __init__(self, seconds: float = ANSWER_SECONDS) -> None:
        self.seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def equal(self, answer: str | None, gold: str) -> bool | None:
        """Whether the formulas are equal; None where that could not be told in time, or in memory.

        Raises `ConfigError` where math-verify cannot be started.
        """
        if answer is None:
            return False
        question = json.dumps({"answer": answer[:LONGEST], "gold": gold[:LONGEST]})
        with self._lock:
            process = self._process if self._process is not None else self._start()
            line = self._ask(process, question + "\n", self.seconds)
            if not line:
                self._process = None
                self._forget()
                return None
        return bool(json.loads(line)["equal"])

    def _start(self) -> "subprocess.Popen[str]":
        # -P: the folder of the program, whose files have common names, is no place to import from.
        command = [sys.executable, "-P", str(WORKER)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._forget = weakref.finalize(self, _end, process)
        if self._ask(process, "", START_SECONDS) != "ready\n":
            self._forget()
            raise ConfigError(f"{PACKAGE} does not start", f"pip install --force-reinstall {PACKAGE}")
        self._process = process
        return process

    @staticmethod
    def _ask(process: "subprocess.Popen[str]", question: str, seconds: float) -> str:
        """The next line of the program, empty where it has died, which it does when the time is up."""
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
