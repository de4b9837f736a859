"""Processes that outlive whoever started them: told apart from later ones of the same number, asked to stop, ended.

On Linux a process is known by its number, the boot, and the clock tick it began in; elsewhere by its number and when
it began. A number alone may belong to a stranger by now.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

DEAD = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
"""States of processes that have ended and were not waited for yet."""

END_SECONDS = 10.0
"""For killed processes to be gone."""


def birth(pid: int) -> str | None:
    """What tells this process from others of its number, or None where none of that number lives.

    Job tables keep it. On Linux it has been `boot:tick` from the first version on; elsewhere tables of before psutil
    hold another form, which is equal to none of today's: their workers count as dead, and nothing is killed for them.
    """
    if pid < 1:
        return None
    try:
        if sys.platform == "linux":
            tick = _tick(pid)
            return None if psutil.Process(pid).status() in DEAD else f"{_boot()}:{tick}"
        process = psutil.Process(pid)
        return None if process.status() in DEAD else repr(process.create_time())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


def alive(pid: int | None, born: str | None) -> bool:
    """Whether the process of that number is the one that was born then."""
    return pid is not None and born is not None and birth(pid) == born


def begin(command: Sequence[str], folder: Path, output: IO[Any], extra: Mapping[str, str] | None = None) -> Any:
    """Start a process at the head of a group of its own, which the death of this one does not end. A `Popen`."""
    apart: dict[str, Any] = {"start_new_session": True}
    if sys.platform == "win32":
        apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
    return subprocess.Popen(
        list(command),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env={**os.environ, **(extra or {})},
        **apart,
    )


def ask_to_stop(group: int, harder: bool) -> None:
    """SIGINT to every process of the group, or SIGTERM. On Windows, where a group hears neither, CTRL_BREAK."""
    if sys.platform == "win32":
        os.kill(group, signal.CTRL_BREAK_EVENT)
        return
    _signal_group(group, signal.SIGTERM if harder else signal.SIGINT)


def end_group(leader: int, born: str | None, member: int | None, member_born: str | None) -> None:
    """Kill what is left of the group of a leader that was born then, and wait until it is gone.

    `member` is one of the group. A leader whose number has gone to another process had left an empty group, as
    the number of a group that lives is not given away: nothing is killed then.
    """
    if sys.platform == "win32":
        _end(pid for pid, when in ((leader, born), (member, member_born)) if pid is not None and alive(pid, when))
        return
    now = birth(leader)
    if born is None or (now is not None and now != born) or not _same_boot(born):
        return
    _signal_group(leader, signal.SIGKILL)
    # psutil.wait_procs would wait for zombies as well, which go only when a parent (in a container: nobody) asks.
    until = time.monotonic() + END_SECONDS
    while time.monotonic() < until and _members(leader):
        time.sleep(0.02)


def _signal_group(group: int, number: int) -> None:
    if sys.platform != "win32" and group > 1:  # 0 and 1 would mean ourselves, and everyone
        try:
            os.killpg(group, number)
        except (ProcessLookupError, PermissionError):  # gone; macOS says the second where only zombies are left
            return


def end_others() -> None:
    """Kill what is left of the group that this process leads, itself apart; on Windows, which has no such groups, what
    is left of its descendants."""
    if sys.platform == "win32":
        _end([os.getpid()], roots_too=False)
        return
    for pid in _members(os.getpid()) - {os.getpid()}:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _members(group: int) -> set[int]:
    """Processes of a group that have not ended. Asked by the group, as children of a dead parent are nobody's."""
    if sys.platform == "win32":
        return set()
    members = set()
    for pid in psutil.pids():
        try:
            if os.getpgid(pid) == group and birth(pid) is not None:
                members.add(pid)
        except (ProcessLookupError, PermissionError):  # gone; another session's, says macOS
            continue
    return members


def _end(roots: Iterable[int], roots_too: bool = True) -> None:
    """Kill processes and all that descend from them, and wait until they are gone."""
    doomed: list[psutil.Process] = []
    for pid in roots:
        try:
            root = psutil.Process(pid)
            doomed += [*([root] if roots_too else []), *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
    for process in doomed:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(doomed, END_SECONDS)


def _tick(pid: int) -> int:
    """The clock tick since the boot in which a Linux process began.

    Psutil adds the boot's time of day, which moves when the clock is set; two processes would then disagree about a
    third. Taken off again, it leaves what the kernel said.
    """
    assert sys.platform != "win32"
    while True:
        boot = psutil.boot_time()
        began = psutil.Process(pid).create_time()
        if psutil.boot_time() == boot:  # the clock was not set between the two
            return round((began - boot) * os.sysconf("SC_CLK_TCK"))


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _same_boot(born: str) -> bool:
    return sys.platform != "linux" or born.startswith(_boot())
