"""From a model's name to an exported folder: weights, smoothing, graphs, card."""

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hildanext.core.errors import ConfigError, UnknownChoice
from hildanext.core.runtime import cpu_flags
from hildanext.export.network_weights import weights_of
from hildanext.export.onnx_card import EXPORT_VERSION, OnnxCard, Precision
from hildanext.export.smoothing import Peaks, activation_peaks, smooth
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.card import CARD
from hildanext.models.draft_card import DraftCard, holds_drafts, read_draft_card
from hildanext.models.draft_checkpoint import ADAPTER, PLACES, load_drafts
from hildanext.models.drafter import Drafter
from hildanext.models.loading.files import weights_hash
from hildanext.models.loading.load import load_diffusion, load_parent
from hildanext.models.loading.names import locate, locate_diffusion, locate_drafts, models_folder, names_checkpoint

PRECISIONS: tuple[Precision, ...] = ("fp32", "q8", "q4")
DOT_PRODUCTS = frozenset({"avx512_vnni", "avx_vnni", "asimddp", "i8mm", "amx_int8"})
"""Instruction sets, in Linux's spelling, that add up signed 8-bit products without saturating."""


@dataclass(frozen=True)
class Source:
    """What is exported."""

    drafter: Drafter | PreTrainedModel
    causal_lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    drafts: DraftCard | None
    diffusion: DiffusionModel | None = None
    """None: the weights are an autoregressive model's."""


def has_dot_products() -> bool:
    """Whether this processor adds up 8-bit products at full speed; without, quantised graphs work, more slowly."""
    return bool(DOT_PRODUCTS & cpu_flags())


def precision_of(dtype: str) -> Precision:
    """`auto` is q8. Raises `UnknownChoice`."""
    for precision in PRECISIONS:
        if dtype == precision or (dtype == "auto" and precision == "q8"):
            return precision
    raise UnknownChoice("dtype of the runtime 'onnx'", dtype, [*PRECISIONS, "auto"])


def cached_export(name: str, precision: Precision, parent: str | None = None, diffusion: bool = False) -> Path:
    """Where the export of a model in a precision lies in the cache: the name is a hash of all that decides it. With
    `diffusion` a name of both kinds (`tiny`) is the diffusion checkpoint's."""
    facts = [str(EXPORT_VERSION), precision, str(has_dot_products())]
    if diffusion:
        folder = locate_diffusion(name)
        facts += [weights_hash(folder), hashlib.sha256((folder / CARD).read_bytes()).hexdigest()]
    elif holds_drafts(name):
        folder = locate_drafts(name)
        home = parent if parent is not None else read_draft_card(folder).parent
        facts += [weights_hash(locate(home))]
        facts += [hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in (ADAPTER, PLACES, CARD)]
    else:
        facts += [weights_hash(locate(name))]
    return models_folder().parent / "onnx" / hashlib.sha256("\n".join(facts).encode()).hexdigest()[:24]


def open_source(name: str, parent: str | None = None, diffusion: bool = False) -> tuple[Source, str, str]:
    """The model of that name (see `cached_export`), draft adapters within where it is a set of them; the name of the
    weights, and their hash.

    Raises `ConfigError` where onnx is not installed, `ModelError` and `CheckpointError` for the model.
    """
    try:
        importlib.import_module("onnx")
    except ImportError:
        raise ConfigError("an export to ONNX needs onnx", 'pip install "hildanext[onnx]"') from None
    if not diffusion and holds_drafts(name):
        drafter, tokenizer, drafts = load_drafts(name, parent=parent)
        home = parent or drafts.parent
        return Source(drafter, drafter.causal_lm, tokenizer, drafts), home, weights_hash(locate(home))
    if parent is not None:
        raise ConfigError(f"{name!r} has no draft adapters that the parent {parent!r} could be of", "leave it out")
    if diffusion or names_checkpoint(name):
        model, tokenizer = load_diffusion(name)
        source = Source(model.causal_lm, model.causal_lm, tokenizer, None, model)
        return source, name, weights_hash(locate_diffusion(name))
    causal_lm, tokenizer = load_parent(name)
    return Source(causal_lm, causal_lm, tokenizer, None), name, weights_hash(locate(name))


def write_source(
    source: Source,
    folder: str | Path,
    precision: Precision,
    parent: str,
    parent_hash: str,
    peaks: Peaks | None = None,
) -> OnnxCard:
    """Write a model that is loaded; `parent` names it, and `peaks` of its inputs are those of text that it draws token
    by token where none are given. Raises `CheckpointError` (out of disk, not writable)."""
    from hildanext.export.onnx_file import save_onnx  # onnx is an extra

    weights = weights_of(source.drafter)
    if precision == "q8":
        smooth(weights, peaks if peaks is not None else activation_peaks(source.causal_lm, source.tokenizer))
    card = OnnxCard(
        dtype=precision, parent=parent, parent_hash=parent_hash,
        layers=len(weights.layers), heads=weights.heads, kv_heads=weights.kv_heads, head_dim=weights.head_dim,
        hidden=weights.hidden, vocab=len(weights.head), inv_freq=tuple(map(float, weights.inv_freq)),
        rope_scale=weights.rope_scale, unsigned=precision == "q8" and not has_dot_products(), drafts=source.drafts,
        diffusion=source.diffusion.card if source.diffusion is not None else None,
    )  # fmt: skip
    save_onnx(folder, weights, card, source.causal_lm, source.tokenizer)
    return card
