"""A folder of prepared shards, read: its manifests, its memory maps, its hashes."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hildanext.core.errors import DataError
from hildanext.core.json_text import BadJson, parse

MANIFEST = "manifest.json"
FORMAT = "hildanext-shards-1"
TOKENS, OFFSETS, STARTS = "<u4", "<u8", "<u4"
ANSWERS = "answers"
"""Setting of a folder whose documents are prompts and answers: each says where its answer begins."""


def part_name(part: int, parts: int) -> str:
    return f"part-{part:05d}-of-{parts:05d}"


def shard_names(number: int, answers: bool = False) -> tuple[str, ...]:
    names = (f"shard-{number:05d}.tokens.u32", f"shard-{number:05d}.offsets.u64")
    return (*names, f"shard-{number:05d}.starts.u32") if answers else names


class Shard(NamedTuple):
    """Memory maps of one."""

    tokens: np.ndarray
    offsets: np.ndarray
    """Where each document begins, and where the last one ends."""
    starts: np.ndarray | None
    """Of each document, how many of its tokens are given and not learnt; None where all are learnt."""


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a whole folder; None where there is none. Raises `DataError` for a broken one."""
    path = folder / MANIFEST
    try:
        manifest = parse(path.read_bytes())
    except FileNotFoundError:
        return None
    except (BadJson, OSError) as problem:
        raise DataError(f"cannot read {path} ({problem})", f"delete {str(folder)!r} and prepare it again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path} is of another format", f"this version reads {FORMAT}; prepare the data again")
    return manifest


def refuse_other_settings(folder: Path, stored: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise `DataError`, naming what differs, when a folder was prepared with other settings."""
    differing = sorted(key for key in stored.keys() | settings.keys() if stored.get(key) != settings.get(key))
    if differing:
        raise DataError(
            f"{str(folder)!r} was prepared with other settings: {', '.join(differing)}",
            "give another output folder, or delete this one to prepare it anew; the two are never mixed",
        )


def refuse_other_parts(folder: Path, part: int, parts: int, settings: Mapping[str, Any]) -> None:
    """Raise `DataError` when `folder` holds data that part `part` of `parts` would not go together with."""
    whole = (folder / MANIFEST).exists() or any(folder.glob("shard-*"))
    others = [place for place in folder.glob("part-*-of-*") if place.is_dir()]
    wrong = [place.name for place in others if parts == 1 or not place.name.endswith(f"-of-{parts:05d}")]
    if (parts > 1 and whole) or wrong:
        held = wrong[0] if wrong else "a corpus prepared in one part"
        raise DataError(f"{str(folder)!r} already holds {held}", "give another output folder, or delete this one first")
    for place in others:
        manifest = read_manifest(place)
        if manifest is not None:
            refuse_other_settings(place, {**manifest["settings"], "shard": [part, parts]}, settings)


def open_manifests(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The manifest of a folder, or of all its parts. Raises `DataError` unless everything is there and alike."""
    whole = read_manifest(folder)
    if whole is not None:
        return [(folder, whole)]
    parts = sorted(folder.glob("part-*-of-*"))
    count = int(parts[0].name.rsplit("-", 1)[-1]) if parts else 0
    manifests = [(part, manifest) for part in parts if (manifest := read_manifest(part)) is not None]
    if not parts or len(manifests) != count:
        state = f"{len(manifests)} of {count} finished parts" if parts else "no finished shards"
        raise DataError(
            f"{str(folder)!r} holds {state}",
            "prepare it (hildanext prepare); a prepare that was cut short goes on when it is run again",
        )
    for part, manifest in manifests[1:]:
        settings = {**manifest["settings"], "shard": manifests[0][1]["settings"]["shard"]}
        refuse_other_settings(part, manifests[0][1]["settings"], settings)
    return manifests


def open_shards(folder: Path, manifest: Mapping[str, Any], verify: bool) -> Iterator[Shard]:
    """Memory maps of each shard. Raises `DataError` for one that is not what was written."""
    answers = bool(manifest["settings"].get(ANSWERS))
    for number, entry in enumerate(manifest["shards"]):
        sizes = (4 * entry["tokens"], 8 * (entry["documents"] + 1), 4 * entry["documents"])
        for name, size in zip(shard_names(number, answers), sizes, strict=False):
            file = folder / name
            if not file.is_file() or file.stat().st_size != size:
                raise DataError(
                    f"{str(file)!r} is missing or not of {size} bytes", f"delete {folder} and prepare it again"
                )
            if verify and sha256(file) != entry["sha256"][name]:
                raise DataError(
                    f"{str(file)!r} is not what was written (its hash differs)", f"delete {folder} and prepare it again"
                )
        maps = zip(shard_names(number, answers), (TOKENS, OFFSETS, STARTS), strict=False)
        tokens, offsets, *starts = (np.memmap(folder / name, kind, "r") for name, kind in maps)
        yield Shard(tokens, offsets, starts[0] if starts else None)


def sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
