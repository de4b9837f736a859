"""Token shards on disk: `shard-00000.tokens.u32`, `shard-00000.offsets.u64`, and one `manifest.json`.

A shard is written to temporary names, synced and renamed, then entered in a journal together with the
reader's cursor. After a kill at any instant the journal says where to go on, and what it does not mention
is thrown away; so a resumed folder is byte for byte the folder of an uninterrupted run.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hildanext.errors import DataError

MANIFEST = "manifest.json"
JOURNAL = "journal.jsonl"
FORMAT = "hildanext-shards-1"
TOKENS, OFFSETS = "<u4", "<u8"


class Progress(NamedTuple):
    """What a journal knows: the shards that are whole, and where the reader stood after the last of them."""

    shards: list[dict[str, Any]]
    cursor: tuple[int, int, int]
    report: dict[str, Any]


def shard_names(number: int) -> tuple[str, str]:
    return f"shard-{number:05d}.tokens.u32", f"shard-{number:05d}.offsets.u64"


def sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def telling_full_disks(folder: Path) -> Iterator[None]:
    """Turn "no space left" into a `DataError` that says what to do."""
    try:
        yield
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"out of disk while writing {str(folder)!r}",
            "free some space and run the same command again: it goes on after the last whole shard",
        ) from None


def write_synced(path: Path, *parts: bytes | memoryview) -> None:
    """Write under a temporary name, sync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as stream:
        for part in parts:
            stream.write(part)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames last; Windows cannot open a folder and needs none of it."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class ShardWriter:
    """Collects documents and writes them as shards of about `shard_tokens` tokens; a document is never split.

    Memory holds one shard. `settings` identifies what is being written: a folder begun with others is refused.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], shard_tokens: int, vocab_size: int) -> None:
        self.folder, self.settings = folder, settings
        self.shard_tokens, self.vocab_size = shard_tokens, vocab_size
        self.shards: list[dict[str, Any]] = []
        self._pieces: list[np.ndarray] = []
        self._lengths: list[int] = []
        self._held = 0
        folder.mkdir(parents=True, exist_ok=True)

    def resume(self) -> Progress | None:
        """What an earlier run left here, after throwing away what it did not finish; None for a fresh folder."""
        journal = self.folder / JOURNAL
        entries = _whole_lines(journal)
        if entries:
            refuse_other_settings(self.folder, entries[0], self.settings)
        self.shards = [entry["shard"] for entry in entries[1:]]
        known = {name for number in range(len(self.shards)) for name in shard_names(number)}
        for file in self.folder.glob("shard-*"):
            if file.name not in known:
                file.unlink()
        if not entries:
            write_synced(journal, _line(self.settings))
            return None
        write_synced(journal, *(_line(entry) for entry in entries))  # without a line that a kill cut short
        if len(entries) == 1:
            return None
        file, offset, record = entries[-1]["cursor"]
        return Progress(self.shards, (file, offset, record), entries[-1]["report"])

    @property
    def empty(self) -> bool:
        """Whether not one document has arrived."""
        return not self.shards and not self._lengths

    def add(self, tokens: Sequence[int] | np.ndarray, where: str) -> bool:
        """Take one document; True when the shard is full and wants `close_shard`.

        Raises `DataError` for an id outside the vocabulary: ids are never wrapped.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size):
            bad = int(ids[(ids < 0) | (ids >= self.vocab_size)][0])
            raise DataError(
                f"{where} holds token id {bad}, outside the vocabulary of {self.vocab_size}",
                "the documents were made with another tokenizer; give the tokenizer that made them",
            )
        self._pieces.append(ids.astype(TOKENS))
        self._lengths.append(ids.size)
        self._held += ids.size
        return self._held >= self.shard_tokens

    def close_shard(self, cursor: Sequence[int], report: dict[str, Any]) -> None:
        """Write what is held and enter it in the journal; a call with nothing held does nothing."""
        if not self._lengths:
            return
        tokens = np.concatenate(self._pieces)
        offsets = np.concatenate([[0], np.cumsum(self._lengths)]).astype(OFFSETS)
        entry: dict[str, Any] = {"tokens": int(tokens.size), "documents": len(self._lengths), "sha256": {}}
        with telling_full_disks(self.folder):
            for name, array in zip(shard_names(len(self.shards)), (tokens, offsets), strict=True):
                data = memoryview(array).cast("B")
                entry["sha256"][name] = hashlib.sha256(data).hexdigest()
                write_synced(self.folder / name, data)
            with open(self.folder / JOURNAL, "ab") as stream:
                stream.write(_line({"shard": entry, "cursor": list(cursor), "report": report}))
                stream.flush()
                os.fsync(stream.fileno())
        self.shards.append(entry)
        self._pieces, self._lengths, self._held = [], [], 0

    def finish(self, manifest: dict[str, Any]) -> None:
        """Write the manifest, then drop the journal: a folder with a manifest is whole."""
        with telling_full_disks(self.folder):
            write_synced(self.folder / MANIFEST, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
        (self.folder / JOURNAL).unlink(missing_ok=True)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a whole folder; None where there is none. Raises `DataError` for a broken one."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise DataError(f"{path} is broken ({problem})", f"delete {str(folder)!r} and prepare again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path} is of another format", f"this version reads {FORMAT}; prepare the data again")
    return manifest


def refuse_other_settings(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise `DataError`, naming what differs, when a folder was begun with other settings."""
    differing = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if differing:
        raise DataError(
            f"{str(folder)!r} was prepared with another {', '.join(differing)}",
            "give another output folder, or delete this one to prepare it anew; the two are never mixed",
        )


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True).encode() + b"\n"


def _whole_lines(journal: Path) -> list[dict[str, Any]]:
    try:
        data = journal.read_bytes()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in data.split(b"\n")[:-1]]
