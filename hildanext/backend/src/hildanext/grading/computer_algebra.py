"""Is a formula the answer? math-verify's verdict, which simplifies with sympy, from a program of its own.

A model's answer may take for ever (`10000000000!`) or all memory, and math-verify's own clocks are signals.
"""

import importlib.metadata
import importlib.util
import json
from pathlib import Path

from hildanext.core.errors import ConfigError
from hildanext.core.line_program import LineProgram
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
    """Grades one answer after another, in a program of its own."""

    def __init__(self, seconds: float = ANSWER_SECONDS) -> None:
        self.seconds = seconds
        self._program = LineProgram(WORKER, START_SECONDS)

    def equal(self, answer: str | None, gold: str) -> bool | None:
        """Whether the formulas are equal; None where that could not be told in time, or in memory.

        Raises `ConfigError` where math-verify cannot be started.
        """
        if answer is None:
            return False
        question = json.dumps({"answer": answer[:LONGEST], "gold": gold[:LONGEST]})
        try:
            line = self._program.ask(question, self.seconds)
        except OSError:
            raise ConfigError(f"{PACKAGE} does not start", f"pip install --force-reinstall {PACKAGE}") from None
        return None if line is None else bool(json.loads(line)["equal"])
