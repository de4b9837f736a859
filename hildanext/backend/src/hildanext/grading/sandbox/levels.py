"""How far a worker can be locked down on this machine, found out by trying, and why no further.

level 3: namespaces and a filter on system calls. 2: namespaces. 1: the filter, with Landlock where the kernel has it.
0: resource limits only, which keep nothing from the program that your own user has.
"""

import glob
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

MECHANISMS = ("namespaces", "seccomp", "landlock")

LEVELS = {
    3: "namespaces and system-call filter",
    2: "namespaces, no system-call filter",
    1: "system-call filter, no namespaces",
    0: "resource limits only",
}


@dataclass(frozen=True)
class Isolation:
    """The mechanisms that work here, and for each other one why it does not."""

    mechanisms: tuple[str, ...]
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def level(self) -> int:
        return 2 * ("namespaces" in self.mechanisms) + ("seccomp" in self.mechanisms)

    def describe(self) -> str:
        """One line: the level, what it is, what can be read."""
        text = f"level {self.level}: {LEVELS[self.level]}"
        if "namespaces" in self.mechanisms:
            return f"{text}; sees Python and its libraries only"
        if "landlock" in self.mechanisms:
            return f"{text}; Landlock: opens Python and its libraries only"
        return f"{text}; can read every file that you can"

    def why_not_higher(self) -> str:
        """What keeps the level from 3, empty where nothing does."""
        wanted = () if self.level == 3 else MECHANISMS
        return "; ".join(f"no {name}: {self.reasons[name]}" for name in wanted if name in self.reasons)


def readable_paths() -> list[str]:
    """What a worker must be able to read: Python's own library, the shared ones it loads, nothing else."""
    prefixes = (sys.base_prefix, sys.base_exec_prefix)  # not a virtual environment, whose packages it cannot import
    paths = {os.path.join(prefix, name) for prefix in prefixes for name in ("lib", sys.platlibdir)}
    paths.add(os.path.dirname(os.__file__))
    paths |= {"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"}
    if sys.base_prefix.startswith("/nix/"):
        paths.add("/nix/store")
    existing = sorted({os.path.normpath(path) for path in paths if os.path.exists(path)})
    return [path for path in existing if not any(path.startswith(above + os.sep) for above in existing)]


def hidden_paths(readable: Iterable[str]) -> list[str]:
    """Installed packages among the readable: a worker imports none, and some hold benchmarks with their answers."""
    patterns = [f"{path}/{place}" for path in readable for place in ("python*/*-packages", "*-packages")]
    return sorted({path for pattern in patterns for path in glob.glob(pattern) if os.path.isdir(path)})


def applicable(working: Iterable[str]) -> tuple[str, ...]:
    """The mechanisms to use of those that work: Landlock only where there is no root of its own."""
    working = set(working)
    if "namespaces" in working:
        working.discard("landlock")
    return tuple(name for name in MECHANISMS if name in working)


CANARY = """
import os

def attempt(act):
    try:
        act()
    except (OSError, ImportError):
        return False
    return True

def escapes(secret, pid):
    import ctypes
    escaped = []
    libc = ctypes.CDLL(None)
    if attempt(lambda: open(secret).close()):
        escaped.append("read a private file")
    if attempt(lambda: open(secret, "a").close()):
        escaped.append("write a private file")
    if libc.socket(2, 1, 0) >= 0:
        escaped.append("make a socket")
    if attempt(lambda: os.kill(pid, 0)):
        escaped.append("signal another process")
    child = libc.fork()
    if child == 0:
        os._exit(0)
    if child > 0:
        escaped.append("make a process")
    if len(os.environ) > 4:
        escaped.append("see the environment")
    return escaped
"""
"""Tries what no worker should manage, and tells what it managed."""


def forbidden(mechanisms: Iterable[str]) -> set[str]:
    """What the canary must not manage with these mechanisms."""
    mechanisms = set(mechanisms)
    nothing = {"see the environment"}
    if "namespaces" in mechanisms:
        nothing |= {"read a private file", "write a private file", "signal another process"}
    if "landlock" in mechanisms:
        nothing |= {"read a private file"}
    if "seccomp" in mechanisms:
        nothing |= {"write a private file", "signal another process", "make a socket", "make a process"}
    return nothing
