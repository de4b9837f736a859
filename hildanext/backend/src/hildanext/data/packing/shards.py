"""Writing token shards: `shard-00000.tokens.u32`, `shard-00000.offsets.u64`, and one `manifest.json`.

A shard is written to temporary names, synced and renamed, then entered in a journal together with the
reader's cursor. After a kill at any instant the journal says where to go on, and what it does not mention
is thrown away; so a resumed folder is byte for byte the folder of an uninterrupted run.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hildanext.core.errors import DataError
from hildanext.core.json_text import BadJson, parse
from hildanext.core.run_dir import disk_errors, write_atomically
from hildanext.data.packing.folder import (
    ANSWERS,
    MANIFEST,
    OFFSETS,
    STARTS,
    TOKENS,
    refuse_other_settings,
    shard_names,
)

try:
    import fcntl
except ModuleNotFoundError:  # Windows: two writers of one folder go unnoticed there
    fcntl = None  # type: ignore[assignment]

JOURNAL = "journal.jsonl"


class Progress(NamedTuple):
    """What a journal knows: where the reader stood after the last whole shard, and what it had refused."""

    cursor: tuple[int, int, int]
    report: dict[str, Any]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second writer out; the system lifts the lock when the process ends, however it ends."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"another process is preparing {str(folder)!r}",
                "wait for it, give another folder, or split the work with --shard i/n",
            ) from None
        yield
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
        self.answers = bool(settings.get(ANSWERS))
        self._pieces: list[np.ndarray] = []
        self._starts: list[int] = []
        self._held = 0

    @property
    def empty(self) -> bool:
        """Whether not one document has arrived."""
        return not self.shards and not self._pieces

    def resume(self) -> Progress | None:
        """What an earlier run left here, after throwing away what it did not finish; None for a fresh folder."""
        journal = self.folder / JOURNAL
        entries = _whole_lines(journal)
        if entries:
            refuse_other_settings(self.folder, entries[0], self.settings)
        self.shards = [entry["shard"] for entry in entries[1:]]
        known = {name for number in range(len(self.shards)) for name in shard_names(number, self.answers)}
        for file in {*self.folder.glob("shard-*"), *self.folder.glob("*.tmp-*")}:
            if file.name not in known:
                file.unlink()
        # rewritten even when it was there: a kill may have cut its last line short
        write_atomically(journal, b"".join(_line(entry) for entry in entries or [self.settings]))
        if not self.shards:
            return None
        file_index, offset, record = entries[-1]["cursor"]
        return Progress((file_index, offset, record), entries[-1]["report"])

    def add(self, tokens: Sequence[int] | np.ndarray, where: str, start: int = 0) -> bool:
        """Take one document, of which `start` tokens are not learnt; True when the shard is full and wants
        `close_shard`.

        Raises `DataError` for an id outside the vocabulary: ids are never wrapped.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        outside = (ids < 0) | (ids >= self.vocab_size)
        if outside.any():
            raise DataError(
                f"{where} holds token id {int(ids[outside][0])}, outside the vocabulary of {self.vocab_size}",
                "the documents were made with another tokenizer; give the tokenizer that made them",
            )
        self._pieces.append(ids.astype(TOKENS))
        self._starts.append(start)
        self._held += ids.size
        return self._held >= self.shard_tokens

    def close_shard(self, cursor: Sequence[int], report: dict[str, Any]) -> None:
        """Write what is held and enter it in the journal; with nothing held, do nothing."""
        if not self._pieces:
            return
        tokens = np.concatenate(self._pieces)
        offsets = np.cumsum([0, *map(len, self._pieces)]).astype(OFFSETS)
        entry: dict[str, Any] = {"tokens": int(tokens.size), "documents": len(self._pieces), "sha256": {}}
        arrays = (tokens, offsets, np.array(self._starts, dtype=STARTS))
        for name, array in zip(shard_names(len(self.shards), self.answers), arrays, strict=False):
            data = array.tobytes()
            entry["sha256"][name] = hashlib.sha256(data).hexdigest()
            write_atomically(self.folder / name, data)
        with disk_errors(self.folder), open(self.folder / JOURNAL, "ab") as stream:
            stream.write(_line({"shard": entry, "cursor": list(cursor), "report": report}))
            stream.flush()
            os.fsync(stream.fileno())
        self.shards.append(entry)
        self._pieces, self._starts, self._held = [], [], 0

    def finish(self, manifest: dict[str, Any]) -> None:
        """Write the manifest, then drop the journal: a folder with a manifest is whole."""
        write_atomically(self.folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        drop_journal(self.folder)


def drop_journal(folder: Path) -> None:
    """Remove what a finished folder does not need; a kill may have come just before this."""
    (folder / JOURNAL).unlink(missing_ok=True)
    for file in folder.glob("*.tmp-*"):
        file.unlink()


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True).encode() + b"\n"


def _whole_lines(journal: Path) -> list[dict[str, Any]]:
    try:
        data = journal.read_bytes()
    except FileNotFoundError:
        return []
    try:
        return [parse(line) for line in data.split(b"\n")[:-1]]
    except BadJson:
        raise DataError(f"{journal} is damaged", f"delete {str(journal.parent)!r} and prepare it again") from None
