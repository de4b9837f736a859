"""Processes that outlive whoever started them: told apart from later ones of the same number, asked to stop, ended.

On Linux a process is known by its number, the boot, and the clock tick it began in; elsewhere by its number and when
it began. A number alone may belong to a stranger by now.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

WINDOWS = sys.platform == "win32"
DEAD = "ZXx"
"""States of Linux processes that have ended and were not waited for yet."""

END_SECONDS = 10.0
"""For killed processes to be gone."""


def birth(pid: int) -> str | None:
    """What tells this process from others of its number, or None where none of that number lives."""
    if sys.platform == "win32":
        return _birth_on_windows(pid)
    if sys.platform == "linux":
        found = _stat(pid)
        return None if found is None or found[0] in DEAD else f"{_boot()}:{found[2]}"
    shown = subprocess.run(["ps", "-o", "state=,lstart=", "-p", str(pid)], capture_output=True, text=True)
    words = shown.stdout.split()
    return " ".join(words[1:]) if words and words[0][0] not in DEAD else None


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


def end_group(
    leader: int, born: str | None, member: int | None, member_born: str | None, seconds: float = 10.0
) -> None:
    """Kill what is left of the group of a leader that was born then, and wait until it is gone.

    `member` is one of the group. A leader whose number has gone to another process had left an empty group, as
    the number of a group that lives is not given away: nothing is killed then.
    """
    if sys.platform == "win32":
        for pid, when in ((member, member_born), (leader, born)):
            if pid is not None and alive(pid, when):
                os.kill(pid, signal.SIGTERM)  # which ends it at once there
        return
    now = birth(leader)
    if born is None or (now is not None and now != born) or not _same_boot(born):
        return
    _signal_group(leader, signal.SIGKILL)
    until = time.monotonic() + END_SECONDS
    while time.monotonic() < until and _any_alive(leader):
        time.sleep(0.02)


def _signal_group(group: int, number: int) -> None:
    if sys.platform != "win32" and group > 1:  # 0 and 1 would mean ourselves, and everyone
        try:
            os.killpg(group, number)
        except (ProcessLookupError, PermissionError):  # gone; macOS says the second where only zombies are left
            return


def end_others() -> None:
    """Kill what is left of the group that this process leads, itself apart. Known of on Linux only."""
    for pid in _members(os.getpid()) - {os.getpid()}:
        try:
            os.kill(pid, signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL)
        except ProcessLookupError:
            continue


def _members(group: int) -> set[int]:
    """Processes of a group that have not ended."""
    if sys.platform != "linux":
        return set()
    numbers = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    found = {number: _stat(number) for number in numbers}
    return {pid for pid, one in found.items() if one is not None and one[1] == group and one[0] not in DEAD}


def _any_alive(group: int) -> bool:
    """Whether a process of the group has not ended. Zombies, which killpg would still find, are dead."""
    if sys.platform == "linux":
        return bool(_members(group))
    if sys.platform != "win32":
        try:
            os.killpg(group, 0)
        except (ProcessLookupError, PermissionError):
            return False
        return True
    return False


def _stat(pid: int) -> tuple[str, int, str] | None:
    """State, group and starting tick of a Linux process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    fields = text[text.rfind(")") + 2 :].split()  # the name, in brackets, may hold anything
    return fields[0], int(fields[2]), fields[19]


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _same_boot(born: str) -> bool:
    return sys.platform != "linux" or born.startswith(_boot())


def _birth_on_windows(pid: int) -> str | None:
    if sys.platform != "win32":
        return None
    import ctypes
    from ctypes import wintypes

    limited_information, still_active = 0x1000, 259
    kernel = ctypes.WinDLL("kernel32", use_last_error=True)
    kernel.OpenProcess.restype = wintypes.HANDLE
    handle = kernel.OpenProcess(limited_information, False, pid)
    if not handle:
        return None
    try:
        code, times = wintypes.DWORD(), [wintypes.FILETIME() for _ in range(4)]
        lives = kernel.GetExitCodeProcess(wintypes.HANDLE(handle), ctypes.byref(code)) and code.value == still_active
        if not lives or not kernel.GetProcessTimes(wintypes.HANDLE(handle), *(ctypes.byref(one) for one in times)):
            return None
        return f"{times[0].dwHighDateTime}:{times[0].dwLowDateTime}"
    finally:
        kernel.CloseHandle(wintypes.HANDLE(handle))
