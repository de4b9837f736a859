"""Locks a child down, lets it serve, and stays behind to kill it: trusted, out of the child's reach from level 1 on.

Started by the checker with the channel on standard input and output; standard error carries one JSON line at the end,
how the child ended. It kills the child when told to (SIGTERM) and when the checker is gone (its end of standard input
closes). Where there is no fork (Windows) this process is itself the worker, and nothing is locked down.
"""

import json
import os
import select
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

from hildanext.grading.sandbox import worker
from hildanext.grading.sandbox.channel import Channel
from hildanext.grading.sandbox.codec import pack

if os.name == "posix":
    from hildanext.grading.sandbox import kernel, namespaces, restrict

LINUX = sys.platform == "linux"
SECONDS_TO_CLEAR = 3.0


def main() -> None:
    """The settings are the one argument, a JSON object."""
    settings = json.loads(sys.argv[1])
    if not hasattr(os, "fork"):
        _serve_here(settings)
    wake = _wake_on_signals()
    try:
        child = _start(settings)
    except OSError as problem:
        _channel(settings, 0, 1).send(pack({"refused": str(problem)}))
        sys.exit(0)
    os.close(1)
    status, usage = _wait(child, wake)
    alone = {"namespaces", "seccomp"} & set(settings["mechanisms"])  # the kernel killed its processes, or it had none
    left = 0 if alone else _clear(child)
    code = os.waitstatus_to_exitcode(status)
    end = {"exit": code, "cpu": round(usage.ru_utime + usage.ru_stime, 3), "peak_kb": usage.ru_maxrss, "left": left}
    os.write(2, json.dumps(end).encode() + b"\n")


def _channel(settings: Mapping[str, Any], read_from: int, write_to: int) -> Channel:
    """What comes from the checker is trusted: a program or an argument may be long once it is written out."""
    return Channel(read_from, write_to, bytes.fromhex(settings["nonce"]), 16 * settings["limits"]["message_bytes"])


def _start(settings: Mapping[str, Any]) -> int:
    if LINUX:
        kernel.prctl("adopt orphans", kernel.PR_SET_CHILD_SUBREAPER, 1)
    if "namespaces" in settings["mechanisms"]:
        namespaces.enter()
    child = os.fork()
    if child:
        return child
    try:
        _become_the_worker(settings)
    finally:
        os._exit(1)


def _become_the_worker(settings: Mapping[str, Any]) -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    restrict.hide_descriptors()
    channel = _channel(settings, *restrict.PRIVATE_FDS)
    try:
        restrict.lock_down(settings)
    except (OSError, ValueError) as problem:
        channel.send(pack({"refused": str(problem)}))
        return
    channel.send(pack({"ready": settings["mechanisms"]}))
    worker.serve(channel, settings["limits"]["message_bytes"])


def _serve_here(settings: Mapping[str, Any]) -> None:
    read_from, write_to = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.chdir(settings["folder"])
    channel = _channel(settings, read_from, write_to)
    channel.send(pack({"ready": []}))
    worker.serve(channel, settings["limits"]["message_bytes"])


def _wake_on_signals() -> int:
    """A descriptor that becomes readable when a child ends or SIGTERM comes."""
    wake, written = os.pipe()
    os.set_blocking(written, False)
    signal.set_wakeup_fd(written)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    return wake


def _wait(child: int, wake: int) -> tuple[int, Any]:
    """The child's wait status and usage; kills it on SIGTERM and at the end of standard input."""
    poll = select.poll()
    poll.register(wake, select.POLLIN)
    poll.register(0, 0)  # reports the other side's end, never data, which is the child's
    told_to_kill = False
    while True:
        ended, status, usage = os.wait4(child, 0 if told_to_kill else os.WNOHANG)
        if ended:
            return status, usage
        for descriptor, _ in poll.poll():
            told_to_kill |= descriptor == 0 or signal.SIGTERM in os.read(wake, 64)
        if told_to_kill:
            os.kill(child, signal.SIGKILL)


def _clear(child: int) -> int:
    """Kill what the child left behind, where no process namespace did; the number of processes that would not go."""
    deadline = time.monotonic() + SECONDS_TO_CLEAR
    while time.monotonic() < deadline:
        left = _descendants(child)
        for process in left:
            kill_if_there(process)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            left = []
        if not left:
            return 0
        time.sleep(0.005)
    return len(_descendants(child))


def kill_if_there(process: int) -> None:
    """Kill a process that may be gone already, or another user's."""
    try:
        os.kill(process, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def _descendants(child: int) -> list[int]:
    """Processes of the child's session and, on Linux, those that this process has adopted, with their children."""
    if not LINUX:
        try:
            os.killpg(child, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        return []
    parents, sessions = {}, {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                    fields = file.read().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                parents[int(name)], sessions[int(name)] = int(fields[1]), int(fields[3])
    mine = {process for process, session in sessions.items() if session == child}
    family = {os.getpid()}
    while grown := {process for process, parent in parents.items() if parent in family} - family:
        family |= grown
    return sorted((mine | family) - {os.getpid()})
