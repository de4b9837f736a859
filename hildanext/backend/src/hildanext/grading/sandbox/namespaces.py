"""A private view of the machine: users, processes, network, shared memory and files of its own.

The launcher enters the namespaces; its next child is process 1 in there, and the kernel kills whatever is left when
that one ends. The child then builds a root that holds Python, its libraries, /dev/null and a small private place to
write.
"""

import os
from collections.abc import Sequence

from hildanext.grading.sandbox import kernel

NOBODY = 65534
WORK = "/.work"
WORK_OPTIONS = "size=16m,nr_inodes=1k,mode=700"
ROOT_OPTIONS = "size=1m,nr_inodes=4k,mode=755"


def enter() -> None:
    """Moves this process into fresh namespaces; its children become processes of the new process namespace.

    Raises `OSError` naming the step that the kernel refused.
    """
    user, group = os.geteuid(), os.getegid()
    go_ahead, mappers = os.pipe()
    mapper = os.fork()  # an id map of more than one entry must be written from outside
    if mapper == 0:
        os.close(mappers)
        os._exit(_map_when_ready(go_ahead, os.getppid(), user, group))
    os.close(go_ahead)
    try:
        kernel.unshare(sum(kernel.NEW_NAMESPACES.values()))
        os.write(mappers, b"!")
    finally:
        os.close(mappers)
        _, status = os.waitpid(mapper, 0)
    code = os.waitstatus_to_exitcode(status)
    if code:
        raise OSError(code, f"user id map: {os.strerror(code)}")
    _forbid_more()


def _map_when_ready(go_ahead: int, process: int, user: int, group: int) -> int:
    if not os.read(go_ahead, 1):
        return 0  # unshare failed, and says so itself
    try:
        if user == 0 and _write_maps(process, "0 0 1\n65534 65534 1", "0 0 1\n65534 65534 1"):
            return 0
        with open(f"/proc/{process}/setgroups", "w") as file:
            file.write("deny")
        _write(process, "uid_map", f"{NOBODY} {user} 1")
        _write(process, "gid_map", f"{NOBODY} {group} 1")
    except OSError as problem:
        return problem.errno or 1
    return 0


def _write_maps(process: int, users: str, groups: str) -> bool:
    """Root inside and outside, and nobody as nobody; False where root may not, as in a container of one user."""
    try:
        _write(process, "uid_map", users)
    except PermissionError:
        return False
    _write(process, "gid_map", groups)
    return True


def _write(process: int, name: str, text: str) -> None:
    with open(f"/proc/{process}/{name}", "w") as file:
        file.write(text)


def _forbid_more() -> None:
    """No namespaces within: a user namespace would hand out capabilities again. Best effort, seccomp forbids it too."""
    try:
        with open("/proc/sys/user/max_user_namespaces", "w") as file:
            file.write("0")
    except OSError:
        pass  # /proc/sys is read-only in most containers


def build_root(readable: Sequence[str], hidden: Sequence[str]) -> None:
    """Makes a root of its own out of `readable` without `hidden`, read-only, and stands in its empty work directory."""
    kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    # Handles stay good when their paths are covered.
    paths = [path for path in (*readable, "/dev/null") if os.path.exists(path)]
    sources = [(path, os.open(path, os.O_PATH | os.O_CLOEXEC)) for path in paths]
    base = next(path for path in ("/tmp", "/mnt", "/run", "/var") if os.path.isdir(path))
    kernel.mount("tmpfs", base, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, ROOT_OPTIONS)
    for path, handle in sources:
        _show(path, handle, base + path)
    for path in hidden:
        options = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_RDONLY
        kernel.mount("tmpfs", base + path, "tmpfs", options, "size=4k,nr_inodes=1,mode=755")
    os.mkdir(base + WORK)
    owner = f",uid={NOBODY},gid={NOBODY}"
    kernel.mount("tmpfs", base + WORK, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, WORK_OPTIONS + owner)
    os.chdir(base)
    kernel.syscall("pivot_root", _pivot_root(), b".", b".")
    kernel.unmount_detached(".")
    os.chdir("/")
    again = kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("", "/", "", again)
    os.chdir(WORK)


def _pivot_root() -> int:
    return {"x86_64": 155}.get(os.uname().machine, 41)


def _show(path: str, handle: int, target: str) -> None:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.isdir(f"/proc/self/fd/{handle}"):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    kernel.mount(f"/proc/self/fd/{handle}", target, "", kernel.MS_BIND | kernel.MS_REC)
    if path != "/dev/null":
        kernel.make_read_only(target)
    os.close(handle)
