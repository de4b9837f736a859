"""A model in ONNX Runtime by its name: an exported folder as it is, anything else exported into the cache first.

`open_diffusion` opens a diffusion checkpoint wherever it is asked for.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hildanext.core.errors import CheckpointError, ConfigError
from hildanext.core.runtime import Runtime, RuntimeConfig, set_threads
from hildanext.export.onnx_card import OnnxCard, is_onnx_folder, read_onnx_card
from hildanext.export.onnx_export import cached_export, has_dot_products, precision_of
from hildanext.models.loading.loaded_model import LoadedModel
from hildanext.runtimes.onnx_blocks import OnnxDiffusion
from hildanext.runtimes.onnx_check import export_checked
from hildanext.runtimes.onnx_network import OnnxNetwork, skeleton
from hildanext.runtimes.onnx_session import load_onnxruntime
from hildanext.tokenization import load_tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedOnnx:
    """What `exact` takes in place of a drafter, its tokenizer, and what it is."""

    network: OnnxNetwork
    tokenizer: PreTrainedTokenizerBase
    card: OnnxCard
    folder: Path


def open_diffusion(name: str, config: RuntimeConfig) -> LoadedModel:
    """A diffusion checkpoint in the runtime that is asked for, or one that was exported. Raises as `LoadedModel.open`
    and `open_onnx`."""
    if not config.is_onnx and not is_onnx_folder(name):
        return LoadedModel.open(name, config)
    opened = open_onnx(name, config, diffusion=True)
    card, network = opened.card, opened.network
    assert card.diffusion is not None
    facts = {"dtype": card.dtype, "runtime": "onnx"}
    if card.distance is not None:
        facts["from_fp32"] = card.distance.line()
    runtime = Runtime(network.device, network.dtype, network.threads)
    return LoadedModel(name, OnnxDiffusion(network, card.diffusion).eval(), opened.tokenizer, runtime, facts=facts)


def open_onnx(name: str, config: RuntimeConfig, parent: str | None = None, diffusion: bool = False) -> OpenedOnnx:
    """`name` is an exported folder, draft adapters or an autoregressive model, with `diffusion` a diffusion checkpoint
    or the export of one; `config.dtype` fp32, q8 (`auto`) or q4.

    Raises `ConfigError` (onnxruntime is missing or too old, another device, an export of another type),
    `UnknownChoice`, `ModelError` or `CheckpointError`.
    """
    load_onnxruntime()
    if config.device not in ("auto", "cpu"):
        raise ConfigError(f"the runtime 'onnx' runs on the CPU, not on {config.device!r}", "leave the device out")
    threads = set_threads(config.threads)
    if is_onnx_folder(name):
        folder, card = Path(name), read_onnx_card(name)
        if config.dtype not in ("auto", card.dtype):
            raise ConfigError(f"{name!r} was exported in {card.dtype}, not {config.dtype}", "leave the dtype out")
    else:
        precision = precision_of(config.dtype)
        folder = cached_export(name, precision, parent, diffusion)
        if not is_onnx_folder(folder):
            log.warning("%s is written as ONNX graphs in %s, once, into %s", name, precision, folder)
            written = export_checked(name, folder, precision, parent, diffusion)
            if written.distance is not None:
                log.warning("from fp32 torch: %s", written.distance.line())
        card = read_onnx_card(folder)
    if diffusion and card.diffusion is None:
        raise CheckpointError(
            f"{name!r} was exported from an autoregressive model", "it writes in exact mode: --mode exact"
        )
    if not diffusion and card.diffusion is not None:
        raise CheckpointError(
            f"{name!r} was exported from a diffusion model", "exact mode needs a parent: --mode S_MODE"
        )
    if card.dtype != "fp32" and not has_dot_products():
        log.warning("this processor has no 8-bit dot products: %s works, and is slow", card.dtype)
    set_threads(1)  # torch has little left to do, and its waiting threads would be in the way of ONNX Runtime's
    network = OnnxNetwork(folder, card, skeleton(folder), threads)
    return OpenedOnnx(network, load_tokenizer(folder), card, folder)
