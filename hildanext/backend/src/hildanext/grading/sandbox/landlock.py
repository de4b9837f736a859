"""Files a process may open, where it cannot have a root of its own: Landlock, Linux 5.13 and newer, needs no privilege.

Names, sizes and dates of other files can still be seen; their contents cannot.
"""

import ctypes
import os
from collections.abc import Sequence

from hildanext.grading.sandbox import kernel

CREATE, ADD_RULE, RESTRICT_SELF = 444, 445, 446
_READ, _LIST = 1 << 2, 1 << 3
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # how many rights each version knows
_BIND_AND_CONNECT = 0b11
_ABSTRACT_SOCKETS_AND_SIGNALS = 0b11


class _Rules(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


def version() -> int:
    """Landlock's version here. Raises `OSError` where the kernel has none."""
    return kernel.syscall("landlock", CREATE, None, 0, 1)


def install(readable: Sequence[str], hidden: Sequence[str]) -> None:
    """From now on only what lies beneath `readable` and not beneath `hidden` can be opened, and only for reading.

    Needs no_new_privs.
    """
    kernel_version = version()
    rules = _Rules(files=(1 << _FILE_RIGHTS.get(kernel_version, 16)) - 1)
    size = 8
    if kernel_version >= 4:
        rules.network, size = _BIND_AND_CONNECT, 16
    if kernel_version >= 6:
        rules.scoped, size = _ABSTRACT_SOCKETS_AND_SIGNALS, 24
    rule_set = kernel.syscall("landlock_create_ruleset", CREATE, ctypes.byref(rules), size, 0)
    for path in readable:
        _allow(rule_set, path, hidden)
    kernel.syscall("landlock_restrict_self", RESTRICT_SELF, rule_set, 0)
    os.close(rule_set)


def _allow(rule_set: int, path: str, hidden: Sequence[str]) -> None:
    """Rules only add: a folder that holds something hidden may be listed, and all else in it is allowed in parts."""
    below = [inner for inner in hidden if inner == path or inner.startswith(path.rstrip("/") + "/")]
    if path in below:
        return
    try:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        return
    folder = os.path.isdir(path)
    rights = _LIST if below else _LIST | _READ if folder else _READ
    beneath = _Beneath(allowed=rights, parent=parent)
    kernel.syscall("landlock_add_rule", ADD_RULE, rule_set, 1, ctypes.byref(beneath), 0)
    os.close(parent)
    if below:
        for entry in os.scandir(path):
            if not entry.is_symlink():  # it would open what it points to, wherever that is
                _allow(rule_set, entry.path, below)
