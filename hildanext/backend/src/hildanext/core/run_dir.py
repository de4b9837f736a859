"""The folder of a run, and the only way files of a run are written: whole, or not at all."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hildanext import __version__
from hildanext.core.errors import CheckpointError, StorageError
from hildanext.core.json_text import BadJson, parse
from hildanext.core.metrics_log import to_json

RUN_FILE = "run.json"


def expand_home(path: str | Path) -> Path:
    """The path with a home folder in place of `~`; left as it is where nobody has that name, at which `Path.expanduser`
    raises `RuntimeError`."""
    return Path(os.path.expanduser(path))


@contextlib.contextmanager
def disk_errors(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn a disk that is full, read-only or gone into a `StorageError` that says what to do."""
    try:
        yield
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            need = f"free {needed} bytes" if needed else "free some space"
            raise StorageError(
                f"out of disk while writing {str(path)!r}", f"{need} and run again; what was there before is untouched"
            ) from None
        if problem.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise StorageError(f"cannot write {str(path)!r} ({problem.strerror})", "give another folder") from None
        raise StorageError(
            f"cannot write {str(path)!r} ({problem.strerror or problem})", "see that its folder is there, and run again"
        ) from None


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Write a file under a temporary name, fsync it, rename it: readers see the old file or the new one.

    Raises `CheckpointError` when the disk is full or does not let us write.
    """
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    fresh = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with disk_errors(path, len(data)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with fresh.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
            _sync_folder(path.parent)
        finally:
            fresh.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Raise `StorageError` where `write_atomically` could not write a file there; nothing of it is left."""
    path = Path(path)
    fresh = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        fresh.touch()
        fresh.unlink()


def save_folder_atomically(path: str | Path, writer: Callable[[Path], None]) -> None:
    """Let `writer` fill a temporary folder, fsync its files, and put it in the place of `path`.

    The old folder stays until the new one is whole. A kill between the two renames leaves the old one
    under `.old` and the new one under `.tmp`; `recover_folder` puts that right.
    Raises `CheckpointError` when the disk is full or does not let us write.
    """
    path = Path(path)
    fresh, old = path.with_name(f"{path.name}.tmp-{os.getpid()}"), path.with_name(f"{path.name}.old")
    with disk_errors(path):
        try:
            recover_folder(path)
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            writer(fresh)
            for file in sorted(fresh.rglob("*")):
                if file.is_file():
                    _sync(file)
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
            fresh.rename(path)
            _sync_folder(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def recover_folder(path: str | Path) -> None:
    """After a kill: bring back the old folder if the new one had not taken its place, drop temporaries."""
    path = Path(path)
    old = path.with_name(f"{path.name}.old")
    if old.exists() and not path.exists():
        old.rename(path)
    for stale in path.parent.glob(f"{path.name}.tmp-*"):
        owner = stale.name.rsplit("-", 1)[-1]
        if owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(stale, ignore_errors=True)


def open_run(folder: str | Path, config: Mapping[str, Any], seed: int, extra: Mapping[str, Any] | None = None) -> Path:
    """Make the folder of a run and write `run.json` into it.

    `extra` adds to the record, for instance `versions`, `data` (hashes) and `full` (names of the FULL
    methods that are on). The record always has `config`, `profile`, `seed`, `hildanext`, `full` and `data`.
    """
    folder = Path(folder)
    record: dict[str, Any] = {
        "hildanext": __version__,
        "profile": config.get("profile", "SAFE"),
        "seed": seed,
        "full": [],
        "data": {},
        **(extra or {}),
        "config": dict(config),
    }
    write_atomically(folder / RUN_FILE, to_json(record, indent=2) + "\n")
    return folder


def read_run(folder: str | Path) -> dict[str, Any] | None:
    """The record of a run's folder, or None where there is none. Raises `CheckpointError` for a broken one."""
    path = Path(folder) / RUN_FILE
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = parse(path.read_bytes(), allow_nan=True, allow_duplicates=True)
    except (OSError, BadJson) as problem:
        raise CheckpointError(f"cannot read {path} ({problem})", "delete it; the next run writes it anew") from None
    return record


def _sync(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder; its rename is journalled
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _alive(process: int) -> bool:
    if process == os.getpid():
        return True
    if os.name == "nt":  # signal 0 would end the process there
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
