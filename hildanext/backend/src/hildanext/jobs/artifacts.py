"""The files of a job's folder: listed, and opened by a name that cannot lead out of it."""

import os
from pathlib import Path

from hildanext.jobs.base import Artefact, ArtefactError

LONGEST = 1024
"""Characters of a name."""


def list_artefacts(folder: Path) -> list[Artefact]:
    """Every regular file in the folder and below, by name. Half-written files and links that lead out are left out."""
    root = folder.resolve()
    artefacts: list[Artefact] = []
    for place, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not _temporary(name)]
        for name in names:
            path = Path(place) / name
            try:
                inside = path.resolve(strict=True).is_relative_to(root) and path.is_file()
                facts = path.stat()
            except (OSError, RuntimeError):  # it went away meanwhile, or links to nothing, or to itself
                continue
            if inside and not _temporary(name):
                artefacts.append(Artefact(path.relative_to(root).as_posix(), facts.st_size, facts.st_mtime))
    return sorted(artefacts, key=lambda artefact: artefact.path)


def find_artefact(folder: Path, name: str) -> Path:
    """The file of that name. Raises `ArtefactError` where there is none, or the name is not a plain relative one."""
    shown = repr(name[:80])
    parts = name.split("/")
    odd = any(letter in name for letter in ("\\", "\0", ":")) or not _encodable(name)
    if odd or len(name) > LONGEST or any(part in ("", ".", "..") for part in parts):
        raise ArtefactError(f"{shown} is no name of an artefact", "names are as the list of artefacts gives them")
    root = folder.resolve()
    try:
        path = root.joinpath(*parts).resolve(strict=True)
        inside = path.is_relative_to(root) and path.is_file()
    except (OSError, RuntimeError):  # absent, too long for the system, or a loop of links
        inside = False
    if not inside or _temporary(parts[-1]):
        raise ArtefactError(f"no artefact {shown}", "names are as the list of artefacts gives them")
    return path


def tail(path: Path, size: int) -> str:
    """The last bytes of a text file from a line's beginning on; "" where there is none."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - size))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    return text if end <= size else text[text.find("\n") + 1 :]


def _temporary(name: str) -> bool:
    return ".tmp" in name and name.rsplit(".tmp", 1)[1].lstrip("-").isdigit()


def _encodable(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
