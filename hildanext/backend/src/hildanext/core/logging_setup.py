"""Where the package's log goes. Set up by the command line only, never on import."""

import logging
import sys
from typing import Any, TextIO

from hildanext.core.errors import ConfigError

LEVELS = ("debug", "info", "warning", "error")


class StandardError(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at that moment: a program may have replaced it since, and closed the old one."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:  # type: ignore[override]  # a terminal, a file, or what a test puts there
        return sys.stderr


def configure_logging(level: str = "info") -> None:
    """Send the package's log to stderr. Raises `ConfigError` for a level that does not exist."""
    if level not in LEVELS:
        raise ConfigError(f"unknown log level {level!r}", f"choices: {', '.join(LEVELS)}")
    handler = StandardError()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("hildanext")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


def quieten_libraries() -> None:
    """Silence what libraries say of extras that nobody asked for; for programs, before anything is imported."""
    # accelerate and peft import bitsandbytes where it is installed, which then misses kernels that we never call.
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)
