"""From a model's name to an exported folder: weights, smoothing, graphs, card."""

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hildanext.core.errors import ConfigError, UnknownChoice
from hildanext.core.runtime import cpu_flags
from hildanext.export.onnx_card import EXPORT_VERSION, OnnxCard, Precision
from hildanext.models.draft_card import DraftCard, holds_drafts, read_draft_card
from hildanext.models.draft_checkpoint import ADAPTER, PLACES, load_drafts
from hildanext.models.drafter import Drafter
from hildanext.models.loading.files import weights_hash
from hildanext.models.loading.load import load_parent
from hildanext.models.loading.names import locate, locate_drafts, models_folder

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


def has_dot_products() -> bool:
    """Whether this processor adds up 8-bit products at full speed; without, quantised graphs work, more slowly."""
    return bool(DOT_PRODUCTS & cpu_flags())


def precision_of(dtype: str) -> Precision:
    """`auto` is q8. Raises `UnknownChoice`."""
    for precision in PRECISIONS:
        if dtype == precision or (dtype == "auto" and precision == "q8"):
            return precision
    raise UnknownChoice("dtype of the runtime 'onnx'", dtype, [*PRECISIONS, "auto"])


def cached_export(name: str, precision: Precision, parent: str | None = None) -> Path:
    """Where the export of a model in a precision lies in the cache: the name is a hash of all that decides it."""
    facts = [str(EXPORT_VERSION), precision, str(has_dot_products())]
    if holds_drafts(name):
        folder = locate_drafts(name)
        home = parent if parent is not None else read_draft_card(folder).parent
        facts += [weights_hash(locate(home))]
        facts += [hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in (ADAPTER, PLACES, "hilda.json")]
    else:
        facts += [weights_hash(locate(name))]
    return models_folder().parent / "onnx" / hashlib.sha256("\n".join(facts).encode()).hexdigest()[:24]


def export_onnx(
    name: str, folder: str | Path, precision: Precision, parent: str | None = None
) -> tuple[OnnxCard, Source]:
    """Write the model of that name, draft adapters within where it is a set of them.

    Raises `ConfigError` where onnx is not installed, `ModelError` and `CheckpointError` for the model or the folder.
    """
    try:
        importlib.import_module("onnx")
    except ImportError:
        raise ConfigError("an export to ONNX needs onnx", 'pip install "hildanext[onnx]"') from None
    source = _open(name, parent)
    home = parent or (source.drafts.parent if source.drafts is not None else name)
    return write_source(source, folder, precision, home, weights_hash(locate(home))), source


def write_source(source: Source, folder: str | Path, precision: Precision, parent: str, parent_hash: str) -> OnnxCard:
    """Write a model that is loaded; `parent` names it. Raises `CheckpointError` (out of disk, not writable)."""
    from hildanext.export.network_weights import weights_of
    from hildanext.export.onnx_file import save_onnx
    from hildanext.export.smoothing import activation_peaks, smooth

    weights = weights_of(source.drafter)
    if precision == "q8":
        smooth(weights, activation_peaks(source.causal_lm, source.tokenizer))
    card = OnnxCard(
        dtype=precision, parent=parent, parent_hash=parent_hash,
        layers=len(weights.layers), heads=weights.heads, kv_heads=weights.kv_heads, head_dim=weights.head_dim,
        hidden=weights.hidden, vocab=len(weights.head), inv_freq=tuple(map(float, weights.inv_freq)),
        rope_scale=weights.rope_scale, unsigned=precision == "q8" and not has_dot_products(), drafts=source.drafts,
    )  # fmt: skip
    save_onnx(folder, weights, card, source.causal_lm, source.tokenizer)
    return card


def _open(name: str, parent: str | None) -> Source:
    if holds_drafts(name):
        drafter, tokenizer, drafts = load_drafts(name, parent=parent)
        return Source(drafter, drafter.causal_lm, tokenizer, drafts)
    causal_lm, tokenizer = load_parent(name)
    return Source(causal_lm, causal_lm, tokenizer, None)
