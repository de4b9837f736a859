"""Everything a worker gives up before it sees the program it is to run, in the only order that works."""

import os
import resource
import sys
from collections.abc import Mapping
from typing import Any

from hildanext.grading.sandbox import kernel, landlock, seccomp
from hildanext.grading.sandbox.levels import MECHANISMS
from hildanext.grading.sandbox.namespaces import NOBODY, build_root

LINUX = sys.platform == "linux"
PRIVATE_FDS = (3, 4)
"""Where the worker's side of the channel lies; everything else is closed or /dev/null."""


def hide_descriptors() -> None:
    """Moves the channel from standard input and output to `PRIVATE_FDS`; leaves /dev/null there, nothing else open."""
    for private_fd, standard in zip(PRIVATE_FDS, (0, 1), strict=True):
        os.dup2(standard, private_fd, inheritable=False)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.closerange(PRIVATE_FDS[-1] + 1, 256)  # a process that was started with three has none beyond


def lock_down(settings: Mapping[str, Any]) -> None:
    """Binds this process for good. Raises `OSError` naming the first mechanism that could not be had.

    `settings` as the launcher was given them: `mechanisms`, `readable`, `hidden`, `limits`, and `folder`, the working
    directory where there is no private one. Call `hide_descriptors` before.
    """
    mechanisms, readable, hidden = settings["mechanisms"], settings["readable"], settings["hidden"]
    if unknown := set(mechanisms) - set(MECHANISMS):
        raise OSError(f"no such mechanism: {', '.join(sorted(unknown))}")
    os.setsid()  # a signal to "my process group" must not reach the launcher
    private = "namespaces" in mechanisms
    if private:
        build_root(readable, hidden)
    else:
        os.chdir(settings["folder"])
    if LINUX:
        kernel.drop_bounding_capabilities()
        if os.getuid() == 0 and (private or all(open_to_others(path) for path in readable)):
            _become_nobody(private)
        kernel.drop_capabilities()
        kernel.prctl("die with the launcher", kernel.PR_SET_PDEATHSIG, 9)  # a change of user would have cleared it
        kernel.prctl("not dumpable", kernel.PR_SET_DUMPABLE, 0)  # a crash must not feed the host's core dump handler
    set_limits(settings["limits"], processes=private and ("seccomp" not in mechanisms or _counts_by_namespace()))
    if "landlock" in mechanisms:
        landlock.install([*readable, "/dev/null", settings["folder"]], hidden)
    if "seccomp" in mechanisms:
        seccomp.install(may_write=private)


def _become_nobody(private: bool) -> None:
    try:
        if not private:
            os.chown(".", NOBODY, NOBODY)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    except PermissionError:
        if private:
            raise


def _counts_by_namespace() -> bool:
    """Whether a user's processes and threads are counted in each user namespace apart (Linux 5.14 and newer)."""
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int("".join(c for c in minor if c.isdigit()) or 0)) >= (5, 14)


def open_to_others(path: str) -> bool:
    """Whether anybody may reach a path; what does not exist hinders nobody."""
    while os.path.exists(path):
        if not os.stat(path).st_mode & (0o001 if os.path.isdir(path) else 0o004):
            return False
        if path == os.path.dirname(path):
            break
        path = os.path.dirname(path)
    return True


def set_limits(limits: Mapping[str, Any], processes: bool = False) -> None:
    """Resource limits of this process and its children. macOS ignores or refuses some; Linux must take all of them."""
    seconds = limits["cpu_seconds"]
    wanted = {
        "AS": limits["memory_bytes"],
        "DATA": limits["memory_bytes"],
        "STACK": limits["stack_bytes"],
        "FSIZE": limits["file_bytes"],
        "NOFILE": limits["open_files"],
        "CORE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
        "CPU": seconds,
    }
    if processes:
        wanted["NPROC"] = limits["processes"]  # counted per user: meaningless unless the user is the worker's own
    for name, most in wanted.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is None:
            continue
        _, hard = resource.getrlimit(kind)
        last = most + 1 if name == "CPU" else most  # the soft one warns, the hard one kills
        last = last if hard == resource.RLIM_INFINITY else min(hard, last)
        try:
            resource.setrlimit(kind, (min(most, last), last))
        except (ValueError, OSError):
            if LINUX:
                raise
