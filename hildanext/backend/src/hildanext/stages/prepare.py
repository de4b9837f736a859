"""Text, or the parent's own samples, to packed shards: `train` and `valid` below the stage's folder."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from hildanext.core.config import Seed, config, merge, validate
from hildanext.core.errors import ConfigError
from hildanext.core.progress import InputShare
from hildanext.core.registry import build
from hildanext.data.sources import SOURCES
from hildanext.recipe import StageContext
from hildanext.stages.parent_answers import answers, asks, identified, read_asked

if TYPE_CHECKING:
    from hildanext.ar import Parent
    from hildanext.datasets import OnProgress, OnShare, PrepareConfig

logger = logging.getLogger(__name__)

PARTS = ("train", "valid")
SEED_OF = {"train": 0, "valid": 1}
"""Added to the run's seed where a part's samples name none, so that none is held out that is also trained on."""


@config
class ParentSamples:
    """Documents drawn from the parent. At temperature 1 its own likelihood is the exact entropy of the corpus."""

    documents: int = Field(ge=1)
    max_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=1.0, gt=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    batch_size: int = Field(default=64, ge=1)
    seed: Seed = 0


def check(section: Mapping[str, Any], context: StageContext) -> None:
    """Raises `ConfigError` for a section without parts, an unknown key or a source that does not exist."""
    from hildanext.datasets import PrepareConfig

    parts = _parts(section, context)
    for part in parts.values():
        settings = validate(PrepareConfig, part, where=context.key)
        if settings.source.get("name") == "parent":
            if section.get("tokenizer"):
                raise ConfigError(f"{context.key}: tokenizer with the source parent", "it has its own: leave it out")
            (read_asked if asks(settings.source) else _samples)(settings.source)
        else:
            build("source", SOURCES, settings.source)
    if len({str(Path(part["out"]).resolve()) for part in parts.values()}) < len(parts):
        raise ConfigError(f"{context.key}: both parts go to {part['out']!r}", "give each its own out, or none")


def stage(section: Mapping[str, Any], context: StageContext) -> dict[str, Any]:
    """Prepare each part. A part that is whole is not done again, and a half one goes on."""
    outcome: dict[str, Any] = {}
    for name, out, manifest in prepare_parts(section, context, reached=InputShare(logger.info).reached):
        outcome[name] = out
        outcome[f"{name}_tokens"], outcome[f"{name}_documents"] = manifest["tokens"], manifest["documents"]
        logger.info("%s: %s documents, %s tokens", name, f"{manifest['documents']:,}", f"{manifest['tokens']:,}")
    return outcome


def prepare_parts(
    section: Mapping[str, Any],
    context: StageContext,
    shard: tuple[int, int] = (0, 1),
    progress: "OnProgress | None" = None,
    reached: "OnShare | None" = None,
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, folder and manifest of each part, as soon as it is whole."""
    from hildanext.datasets import prepare

    for name, part in _parts(section, context).items():
        settings, tokenizer, written = _open_part(name, part, section.get("tokenizer"), context)
        if "answers" in written and shard != (0, 1):
            raise ConfigError("--shard with prompts", "one process answers them; leave it out")
        yield name, settings.out, prepare(settings, tokenizer, shard, progress=progress, reached=reached, **written)


def _open_part(
    name: str, part: Mapping[str, Any], tokenizer_name: str | None, context: StageContext
) -> "tuple[PrepareConfig, Any, dict[str, Any]]":
    """What `prepare` is called with for a part: its knobs, its tokenizer (None: the parent's), and what the parent
    writes, where it does. Raises `ConfigError`, or `ModelError` for a model that is not there."""
    from hildanext.datasets import PrepareConfig
    from hildanext.models.loading.names import locate

    settings = validate(PrepareConfig, part, where=context.key)
    if settings.source.get("name") == "parent":
        seed = context.seed + SEED_OF[name]
        source = {**({"seed": seed} if seed else {}), **settings.source}
        facts = _parent_facts(context.start)
        if asks(source):
            asked = read_asked(source)
            parent = _open_parent(context)
            whole = replace(settings, source=identified(*asked, facts), add_bos=False, add_eos=False)
            return (
                whole,
                parent.tokenizer,
                {
                    "answers": partial(answers, *asked, parent, Path(settings.out)),
                    "total": len(asked[1]),
                },
            )
        parent, wanted = _open_parent(context), _samples(source)
        documents = partial(_drawn, parent, wanted)
        return (
            replace(settings, source={**source, **facts}),
            parent.tokenizer,
            {"documents": documents, "total": wanted.documents},
        )
    return settings, load_tokenizer(locate(tokenizer_name or context.start)), {}


def load_tokenizer(place: Path) -> Any:
    """The tokenizer of a model's folder or GGUF file."""
    if place.is_file():
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(place.parent, gguf_file=place.name)
    from hildanext.tokenization import load_tokenizer as from_folder

    return from_folder(place)


def _parts(section: Mapping[str, Any], context: StageContext) -> dict[str, dict[str, Any]]:
    shared = {key: value for key, value in section.items() if key not in (*PARTS, "tokenizer")}
    named = [name for name in PARTS if isinstance(section.get(name), Mapping)]
    if not named and "source" in shared:
        out = context.stage_dir if context.alone else context.stage_dir / "train"
        return {"train": {"out": str(out), **shared}}
    if not named:
        if context.alone:
            raise ConfigError(
                "no source", "give --source tinystories --path FILE (hildanext prepare --help shows more)"
            )
        raise ConfigError("prepare has no parts", 'give "train" and "valid", each with a "source"')
    return {name: {"out": str(context.stage_dir / name), **merge(shared, section[name])} for name in named}


def _samples(source: Mapping[str, Any]) -> ParentSamples:
    return validate(ParentSamples, {key: value for key, value in source.items() if key != "name"}, "source parent")


def _parent_facts(parent: str) -> dict[str, Any]:
    """The parent's name and weights, without which samples of one parent would pass for another's."""
    from hildanext.models.loading.files import weights_hash
    from hildanext.models.loading.names import locate
    from hildanext.models.start import public_name

    return {"parent": public_name(parent), "weights": weights_hash(locate(parent))}


def _open_parent(context: StageContext) -> "Parent":
    """Rows of its embedding that stand for no word are never drawn: no text holds them."""
    import torch

    from hildanext.ar import Parent
    from hildanext.models.loading.load import load_parent

    device, dtype = context.open_device()
    causal_lm, tokenizer = load_parent(context.start, dtype, device)
    rows, words = len(causal_lm.get_output_embeddings().weight), max(tokenizer.get_vocab().values()) + 1
    return Parent(causal_lm, tokenizer, torch.arange(rows, device=device) >= words if rows > words else None)


def _drawn(parent: "Parent", wanted: ParentSamples, skip: int) -> Iterator[Sequence[int]]:
    """Documents of the parent's own; those that are done already are drawn again and left out."""
    from hildanext.ar import sample_documents

    drawn = sample_documents(
        parent,
        wanted.documents,
        wanted.max_tokens,
        wanted.seed,
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        batch_size=wanted.batch_size,
    )
    return islice(drawn, skip, None)
