"""What models are here: the embedded pair, and what was pulled into the models folder. Loads no weights."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hildanext.core.errors import ModelError, UnknownChoice
from hildanext.core.run_dir import disk_errors, expand_home
from hildanext.models.card import CARD
from hildanext.models.loading import tiny
from hildanext.models.loading.names import CONFIG, KNOWN, PARTIAL, models_folder, refuse_run

Kind = Literal["autoregressive", "diffusion", "unfinished"]
EMBEDDED_LICENCE = "MIT"


@dataclass(frozen=True)
class Held:
    """A model that is here. `size` are the bytes of its files; what links among them point to is not counted."""

    name: str
    kind: Kind
    size: int
    licence: str | None
    """None: not known here, its page says."""
    folder: Path
    link: bool = False
    """The folder is elsewhere, and only a link to it is in the models folder."""


def embedded() -> list[Held]:
    """Both halves of `tiny`. Raises `ModelError` where this installation lacks one."""
    folders = [tiny.folder("ar"), tiny.folder("diffusion")]
    return [Held("tiny", kind_of(folder), size_of(folder), EMBEDDED_LICENCE, folder) for folder in folders]


def pulled() -> list[Held]:
    """What lies in the models folder, by name; a pull that broke off is `unfinished`. Raises `ModelError`."""
    root = models_folder()
    try:
        folders = sorted(entry for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
    except OSError as problem:
        raise ModelError(f"cannot read {str(root)!r} ({problem.strerror})", "check its permissions") from None
    return [_held(folder) for folder in folders]


def _held(folder: Path) -> Held:
    whole = folder.name.removesuffix(f"{PARTIAL}.wheel").removesuffix(PARTIAL)
    name = whole.replace("--", "/", 1)
    known = KNOWN.get(name)
    kind = kind_of(folder) if whole == folder.name else "unfinished"
    licence = known.licence if known is not None else None
    return Held(name, kind, size_of(folder), licence, folder, folder.is_symlink())


def kind_of(folder: Path) -> Kind:
    """By what the folder holds."""
    if (folder / CARD).is_file():
        return "diffusion"
    return "autoregressive" if (folder / CONFIG).is_file() else "unfinished"


def files_of(folder: Path) -> Iterator[tuple[str, int]]:
    """The files of a folder with their sizes in bytes, by name."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(place, name)
            yield str(path.relative_to(folder)), path.lstat().st_size


def size_of(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(size for _, size in files_of(folder))


def find(name: str) -> list[Held]:
    """A model that is here, by name or folder. Raises `ModelError`, `UnknownChoice`."""
    if name == "tiny":
        return embedded()
    folder = expand_home(name)
    if name in KNOWN or not name or not folder.is_dir():
        return find_pulled(name)
    refuse_run(folder)
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{name!r} has no {CONFIG}", "give the folder of a model, or a name that models list shows")
    return [Held(name, kind_of(folder), size_of(folder), None, folder)]


def find_pulled(name: str) -> list[Held]:
    """What a name stands for in the models folder: the model, what an unfinished pull left of it, or both.

    Raises `ModelError` for the embedded model, and for one that was not pulled.
    """
    if name == "tiny":
        raise ModelError("tiny is part of the package", "it stays as long as hildanext is installed")
    here = pulled()
    found = [held for held in here if held.name == name]
    if not found and name in KNOWN:
        raise ModelError(f"{name} is not here", f"hildanext pull {name} fetches it")
    if not found:
        raise UnknownChoice("pulled model", name, {held.name for held in here})
    return found


def remove(held: Held) -> None:
    """Delete a model of the models folder; of a link the link alone. Raises `ModelError`, `StorageError`."""
    if held.folder.parent != models_folder():
        raise ModelError(f"{str(held.folder)!r} was not pulled", "hildanext models list names what was")
    with disk_errors(held.folder):
        if held.folder.is_symlink():
            held.folder.unlink()
        else:
            shutil.rmtree(held.folder)  # links inside are deleted, what they point to is not
