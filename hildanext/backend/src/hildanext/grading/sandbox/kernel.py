"""System calls that Python 3.11 has no name for, through ctypes. Linux only; each raises `OSError` naming the call."""

import ctypes
import functools
import os

NEW_NAMESPACES = {
    "user": 0x10000000,
    "mount": 0x00020000,
    "pid": 0x20000000,
    "net": 0x40000000,
    "ipc": 0x08000000,
    "uts": 0x04000000,
    "cgroup": 0x02000000,
}

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_SETATTR = 442  # one number on every machine, as are Landlock's

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 4, 22, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 36, 38, 47

_CAPABILITY_VERSION_3 = 0x20080522


@functools.lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(what: str, number: int, *arguments: object) -> int:
    """A system call by number; `what` names it where it fails."""
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _checked(_libc().syscall(ctypes.c_long(number), *words), what)


def prctl(what: str, option: int, *arguments: object) -> int:
    words = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    words += [ctypes.c_ulong(0)] * (4 - len(words))
    return _checked(_libc().prctl(option, *words), what)


def unshare(flags: int) -> None:
    _checked(_libc().unshare(flags), "unshare")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    words = [text.encode() if text else None for text in (source, target, kind)]
    data = options.encode() if options else None
    _checked(_libc().mount(*words, ctypes.c_ulong(flags), data), f"mount {kind or 'bind'} on {target}")


def unmount_detached(target: str) -> None:
    _checked(_libc().umount2(target.encode(), MNT_DETACH), f"unmount {target}")


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user_namespace")]


def make_read_only(target: str) -> None:
    """The mount at `target` and, from Linux 5.12 on, every mount below it."""
    attributes = _MountAttributes(set=MS_RDONLY | MS_NOSUID)
    size = ctypes.sizeof(attributes)
    try:
        call = ctypes.byref(attributes)
        syscall("mount_setattr", MOUNT_SETATTR, AT_FDCWD, ctypes.c_char_p(target.encode()), AT_RECURSIVE, call, size)
    except OSError:
        # A remount must repeat the flags of the mount it came from; statvfs shares their low bits.
        kept = os.statvfs(target).f_flag & (MS_RDONLY | MS_NOSUID | MS_NODEV | 8 | 1024 | 2048)
        mount("", target, "", MS_REMOUNT | MS_BIND | MS_RDONLY | kept)


def drop_bounding_capabilities() -> None:
    """No program started from here can gain a capability, whatever its file says."""
    for capability in range(64):
        try:
            prctl("drop capability", PR_CAPBSET_DROP, capability)
        except OSError:
            break  # past the last one, or we may not, and then have none to drop


def drop_capabilities() -> None:
    """Gives up every capability this process has, for good."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    _checked(_libc().capset(header, nothing), "capset")
    prctl("no_new_privs", PR_SET_NO_NEW_PRIVS, 1)
