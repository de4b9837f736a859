"""A filter on system calls: what `syscalls.py` lists may pass, some only with harmless arguments, the rest fails.

The filter is a classic BPF program, one linear list of instructions, installed for good by the process it binds.
"""

import ctypes
import os
from collections.abc import Iterable
from typing import NamedTuple

from hildanext.grading.sandbox import kernel
from hildanext.grading.sandbox.syscalls import ALLOWED, AUDIT_ARCH, NUMBERS, WRITING

LOAD, AND, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
NOT_PERMITTED, NO_SUCH_CALL = REFUSE | 1, REFUSE | 38

CALL, ARCHITECTURE = 0, 4
X32 = 0x40000000
FIRST_NEW_CALL = 424

_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030)
"""Duplicate, flags, locks. Not F_SETOWN, which aims signals at others, nor pipe sizes."""
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""Is it a terminal, how wide, how much is there to read, non-blocking, close on exec."""
_PRCTL = (15, 16)
"""A thread's name."""
_NAMESPACE_FLAGS, _THREAD_FLAG = 0x7E020000, 0x10000
_WRITE_FLAGS = 0o3 | 0o100 | 0o1000 | 0o20000000
"""Writing, creating, truncating, nameless temporary files."""


class Instruction(NamedTuple):
    code: int
    when_true: int
    when_false: int
    value: int


class Check(NamedTuple):
    """One half of an argument (`offset` into the call's record), masked, is one of `values`."""

    offset: int
    mask: int
    values: tuple[int, ...]


def argument(index: int, values: Iterable[int], mask: int = 0xFFFFFFFF, high: bool = False) -> Check:
    """A check of an argument's low half, or of its high one. Little-endian machines only."""
    return Check(16 + 8 * index + 4 * high, mask, tuple(values))


def checks(own_pid: int, may_write: bool) -> dict[str, list[Check]]:
    """Calls that pass only if all their checks hold."""
    rules = {
        "clone": [argument(0, [_THREAD_FLAG], _NAMESPACE_FLAGS | _THREAD_FLAG)],  # threads, never processes
        "kill": [argument(0, [own_pid])],
        "tgkill": [argument(0, [own_pid])],
        "fcntl": [argument(1, _FCNTL)],
        "ioctl": [argument(1, _IOCTL)],
        "prctl": [argument(0, _PRCTL)],
        "prlimit64": [argument(0, [0]), argument(2, [0]), argument(2, [0], high=True)],  # read one's own
    }
    if not may_write:
        rules["open"] = [argument(1, [0], _WRITE_FLAGS)]
        rules["openat"] = [argument(2, [0], _WRITE_FLAGS)]
    return rules


def compile_filter(machine: str, own_pid: int, may_write: bool) -> list[Instruction]:
    """The program for a kind of machine. Raises `OSError` where we know no numbers for it."""
    numbers = NUMBERS.get(machine)
    if numbers is None:
        raise OSError(f"no table of system calls for {machine!r}, only for {', '.join(NUMBERS)}")
    program = [
        Instruction(LOAD, 0, 0, ARCHITECTURE),
        Instruction(EQUAL, 1, 0, AUDIT_ARCH[machine]),
        Instruction(RETURN, 0, 0, KILL),
        Instruction(LOAD, 0, 0, CALL),
        Instruction(AT_LEAST, 0, 1, X32),  # also the 32-bit-pointer calls of x86_64
        Instruction(RETURN, 0, 0, KILL),
    ]
    checked = checks(own_pid, may_write)
    passing = ["open", "openat", *ALLOWED, *(WRITING if may_write else ())]
    for name in passing:
        if name in numbers and name not in checked:
            program += [Instruction(EQUAL, 0, 1, numbers[name]), Instruction(RETURN, 0, 0, ALLOW)]
    for name, tests in checked.items():
        if name in numbers:
            body = _all_hold(tests)
            program += [Instruction(EQUAL, 0, len(body), numbers[name]), *body]
    return [
        *program,
        Instruction(AT_LEAST, 0, 1, FIRST_NEW_CALL),
        Instruction(RETURN, 0, 0, NO_SUCH_CALL),
        Instruction(RETURN, 0, 0, NOT_PERMITTED),
    ]


def _all_hold(tests: list[Check]) -> list[Instruction]:
    """Allow if every check holds, else refuse; never falls through."""
    body: list[Instruction] = []
    for test in tests:
        body += [Instruction(LOAD, 0, 0, test.offset), Instruction(AND, 0, 0, test.mask)]
        for place, value in enumerate(test.values):
            after = len(test.values) - place - 1
            body.append(Instruction(EQUAL, after + 1, 0, value))
        body.append(Instruction(RETURN, 0, 0, NOT_PERMITTED))
    return [*body, Instruction(RETURN, 0, 0, ALLOW)]


def install(may_write: bool) -> None:
    """Binds this process and all its threads, for good. Needs no_new_privs. Raises `OSError` where that cannot be."""
    program = compile_filter(os.uname().machine, os.getpid(), may_write)
    packed = (ctypes.c_uint64 * len(program))(
        *(code | yes << 16 | no << 24 | value << 32 for code, yes, no, value in program)
    )

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]

    described = Program(len(program), ctypes.cast(packed, ctypes.c_void_p))
    kernel.prctl("seccomp", kernel.PR_SET_SECCOMP, 2, ctypes.byref(described))
