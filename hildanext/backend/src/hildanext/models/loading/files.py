"""A model folder before anything is loaded from it: is it whole, is it safe, is it of a kind we know?"""

import contextlib
import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from hildanext.core.errors import ModelError
from hildanext.core.json_text import BadJson, parse
from hildanext.models.card import CARD
from hildanext.models.loading.model_config import MAJOR, Shapes, check_sizes, read_config

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPE = "dtype" if MAJOR >= 5 else "torch_dtype"
"""What Transformers calls the weights' type."""
AGAIN = "download or copy the model again"
STORED = {"F16": torch.float16, "BF16": torch.bfloat16}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def check_folder(folder: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """Check that `folder` holds a whole, supported model in safetensors; returns its `config.json`.

    Raises `ModelError` naming the file that is missing, cut short or of a refused kind, for sizes that are not those
    of the weights, and for code of the folder's own, unless that is trusted.
    """
    fields = read_model_json(folder / "config.json")
    if not trust_remote_code:
        refuse_code(folder)
    check_sizes(read_config(fields, folder), _shapes(folder), folder)
    return fields


def refuse_code(folder: Path) -> None:
    """Raise `ModelError` where the folder names Python code of its own that would have to be run."""
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and read_model_json(folder / name).get("auto_map"):
            raise ModelError(
                f"{str(folder / name)!r} names code of its own (auto_map), which is not run",
                "set trust_remote_code if you trust it, or take auto_map out to use Transformers' own class",
            )


def _shapes(folder: Path) -> Shapes:
    """Of every tensor of a folder."""
    files = weight_files(folder)
    return {name: tuple(entry["shape"]) for path in files for name, entry in check_safetensors(path).items()}


def read_model_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder; `ModelError` where it is missing or broken."""
    try:
        value = parse(path.read_bytes(), allow_nan=True, allow_duplicates=True)
    except FileNotFoundError:
        raise ModelError(
            f"{str(path.parent)!r} has no {path.name}", "give a model folder; a half-finished download must be repeated"
        ) from None
    except (OSError, BadJson) as problem:
        raise ModelError(f"{path} is broken ({first_line(problem)})", AGAIN) from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object", AGAIN)
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder; every shard that the index names must exist."""
    if (folder / INDEX).is_file():
        weight_map = read_model_json(folder / INDEX).get("weight_map")
        shards = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing or not shards:
            raise ModelError(
                f"{str(folder)!r} is half downloaded: {', '.join(missing) or INDEX + ' names no shards'} missing",
                "finish the download (hildanext pull, or copy the file)",
            )
        return [folder / name for name in shards]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    pickles = sorted({path.name for pattern in PICKLES for path in folder.glob(pattern)} - {"training_args.bin"})
    if pickles:
        raise ModelError(
            f"{str(folder)!r} has only pickled weights ({pickles[0]})",
            "pickles can run code, so they are never loaded; get or convert the model to safetensors",
        )
    strays = sorted(path.name for path in folder.glob("*.safetensors*"))
    only = f" (found only {', '.join(strays)})" if strays else ""
    raise ModelError(f"{str(folder)!r} has no {WEIGHTS}{only}", "the download is not finished; repeat it")


def stored_dtype(folder: Path) -> torch.dtype:
    """The type that loses nothing of a folder's weights: the one they are stored in, fp32 where they differ."""
    kinds = {entry["dtype"] for path in weight_files(folder) for entry in check_safetensors(path).values()}
    return STORED.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def check_safetensors(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a file's header by name; `ModelError` where the file is shorter than they promise."""
    hint = "delete it and download or copy it again"
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > size - 8:
            raise ModelError(f"{path} is cut short ({size} bytes, its header alone needs {length + 8})", hint)
        try:
            header = parse(file.read(length))
            entries = {name: dict(entry) for name, entry in header.items() if name != "__metadata__"}
            promised = 8 + length + max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
            if not all(isinstance(size, int) for entry in entries.values() for size in entry["shape"]):
                raise ValueError("a shape that is none")
        except (ValueError, TypeError, AttributeError, LookupError):
            raise ModelError(f"{path} is not a safetensors file", hint) from None
    if size != promised:
        raise ModelError(f"{path} is cut short or overlong ({size} bytes, {promised} promised)", hint)
    return entries


def weights_hash(place: Path) -> str:
    """Of the weights of a model's folder or .gguf file, byte for byte: cheaper than what anybody does with them."""
    digest = hashlib.sha256()
    for path in [place] if place.is_file() else weight_files(place):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def refuse_diffusion(folder: Path) -> None:
    """A parent is autoregressive; a diffusion checkpoint given as one would be read with the wrong conventions."""
    if (folder / CARD).is_file():
        raise ModelError(
            f"{str(folder)!r} is a diffusion checkpoint ({CARD}), not an autoregressive parent",
            "give the model it was converted from, or use a verb that takes diffusion models (generate, eval)",
        )


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Transformers shows a bar for every load; ours are quiet."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def first_line(problem: BaseException) -> str:
    """What a library's exception says, short enough for one line."""
    text = str(problem).strip()
    return text.splitlines()[0][:200] if text else type(problem).__name__
