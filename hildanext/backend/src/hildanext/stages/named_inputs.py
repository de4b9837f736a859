"""What a submission names, looked at before it is queued: models, data, and whether they fit each other.

Nothing is fetched: a model of the hub that is not here yet is left to the job, and so is what another job of the same
folder has still to make.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from hildanext.core.config import merge
from hildanext.core.errors import ModelError
from hildanext.core.registry import build
from hildanext.core.run_dir import expand_home
from hildanext.data.sources import SOURCES
from hildanext.data.sources.base import Source
from hildanext.data.sources.chat import CHATS, ChatSource
from hildanext.datasets import PackedDataset
from hildanext.models.card import read_card
from hildanext.models.loading.files import check_folder, refuse_diffusion
from hildanext.models.loading.names import KNOWN, is_hub_id, locate, locate_diffusion, pulled_folder
from hildanext.recipe import RunConfig, Step, finished
from hildanext.tokenization import load_tokenizer

Kind = Literal["parent", "diffusion", "either"]

MODELS: Mapping[str, Mapping[str, Kind]] = {
    "prepare": {"tokenizer": "parent"},
    "convert": {"parent": "parent"},
    "sft": {"model": "diffusion", "parent.name": "parent", "teacher": "parent"},
    "rl": {"model": "diffusion"},
    "eval": {"model": "diffusion", "parent": "parent"},
    "bench": {"model": "either", "parent": "parent"},
    "generate": {"model": "diffusion", "parent": "parent"},
}
"""By stage: the fields that name a model."""

SHARDS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "convert": ("parent", ("data.train", "data.valid")),
    "eval": ("model", ("data",)),
}
"""By stage: the field of the model whose tokenizer must have made the shards that these fields name."""


def check_inputs(step: Step, run: RunConfig, jobs: Path) -> None:
    """Look at what a step names, and the run for it; `jobs` is the folder that other jobs write below.

    Raises `ModelError`, `CheckpointError` and `DataError` for what is not there or does not fit.
    """
    section, fields = step.section, MODELS.get(step.stage, {})
    named = {field: value_at(section, field) for field in fields}
    if "parent" in fields and named["parent"] is None:
        named["parent"] = run.start if step.stage == "convert" else run.parent
    places = {
        field: _locate(name, fields[field])
        for field, name in named.items()
        if isinstance(name, str) and name and not _promised(name, jobs)
    }
    owner, folders = SHARDS.get(step.stage, ("", ()))
    for folder in (value_at(section, field) for field in folders):
        if isinstance(folder, str) and not _promised(folder, jobs):
            _check_shards(folder, places.get(owner))
    for source in _sources(step, jobs):
        source.fingerprint()
    other = value_at(section, "run") if step.stage == "report" else None
    if isinstance(other, str) and not _promised(other, jobs):
        finished(other)


def value_at(section: Mapping[str, Any], name: str) -> Any:
    """The value of a dotted name; None where there is none."""
    value: Any = section
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _promised(name: str, jobs: Path) -> bool:
    """Whether it lies in the folder of a job, which may still make it."""
    place = expand_home(name).resolve()
    return jobs in place.parents and (jobs / place.relative_to(jobs).parts[0]).is_dir() and not place.exists()


def _locate(name: str, kind: Kind) -> Path | None:
    """Where a model is; None where it has to be fetched first."""
    if not expand_home(name).exists() and not pulled_folder(name).is_dir():
        if is_hub_id(name) and Path(name).parent.is_dir():
            raise ModelError(f"no folder {name!r}", f"{str(Path(name).parent)!r} is there and does not hold it")
        if is_hub_id(name) or (name in KNOWN and kind != "diffusion"):
            return None
    place = locate_diffusion(name) if kind == "diffusion" else locate(name)
    if place.is_file():  # GGUF
        return place
    if kind == "diffusion":
        read_card(place)
    elif kind == "parent":
        refuse_diffusion(place)
    check_folder(place)
    return place


def _check_shards(folder: str, model: Path | None) -> None:
    """Raise `DataError` for shards that are not whole, or that the model's tokenizer did not make."""
    tokenizer = load_tokenizer(model) if model is not None and model.is_dir() else None
    PackedDataset(folder, 1, tokenizer=tokenizer)


def _sources(step: Step, jobs: Path) -> Iterator[Source | ChatSource]:
    """Where a step reads documents or conversations, built."""
    table: Mapping[str, Any] = CHATS if step.stage == "sft" else SOURCES
    for section in _source_sections(step):
        paths = section.get("path", ())
        promised = any(_promised(path, jobs) for path in ([paths] if isinstance(paths, str) else paths))
        if section.get("name") in table and not promised:  # documents of the parent have no source
            yield build("source", table, section)


def _source_sections(step: Step) -> list[Mapping[str, Any]]:
    parts = ("train", "valid")
    if step.stage == "sft":
        found = [value_at(step.section, f"chat.{part}") for part in parts]
    elif step.stage == "prepare":
        named = [
            merge(step.section, step.section[part]) for part in parts if isinstance(step.section.get(part), Mapping)
        ]
        found = [part.get("source") for part in named or [step.section]]
    else:
        found = []
    return [section for section in found if isinstance(section, Mapping)]
