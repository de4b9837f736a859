"""Diffusion checkpoints on disk: plain safetensors, Transformers' config, the tokenizer and `hilda.json`.

A checkpoint is written whole or not at all, loads without this package (the weights keep their names), and
reads the same under transformers 4.51 and 5.x.
"""

import errno
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hildanext.core.errors import CheckpointError
from hildanext.core.run_dir import disk_errors, save_folder_atomically
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.card import CARD, card_text, read_card
from hildanext.models.loading.files import WEIGHTS, check_safetensors, weight_files
from hildanext.models.loading.load import load_diffusion
from hildanext.models.loading.weights_check import EMBEDDING, HEAD
from hildanext.models.quantize import Nf4Linear
from hildanext.tokenization import is_tied, save_tokenizer

__all__ = [
    "load_diffusion",
    "load_weights",
    "merge_checkpoints",
    "plain_state",
    "rehearse_save",
    "save_causal",
    "save_diffusion",
]

ONE_RUN = "merge checkpoints of one run"
ADAPTER_PARTS = (".lora_", "lora_")


def save_diffusion(
    folder: str | Path,
    model: DiffusionModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a diffusion checkpoint atomically; `dtype` None keeps the weights' own.

    Adapters are merged into their weights and `mask_delta` into the mask's row, so that what is written is a
    plain model. The model in memory is left as it is. Raises `CheckpointError` (out of disk, not writable).
    """
    state = plain_state(model.causal_lm, dtype)
    if model.mask_delta is not None:
        row = state[EMBEDDING][model.card.mask_id]
        merged = row.float() + model.mask_delta.detach().float().to(row.device)
        state[EMBEDDING] = state[EMBEDDING].clone()
        state[EMBEDDING][model.card.mask_id] = merged.to(row.dtype)

    def write(fresh: Path) -> None:
        _write(fresh, model.causal_lm, state, tokenizer)
        card = replace(model.card, fast=None)  # which was measured with other weights
        (fresh / CARD).write_text(card_text(card), encoding="utf-8")

    save_folder_atomically(folder, write)


def save_causal(
    folder: str | Path,
    causal_lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype | None = None,
) -> None:
    """Write an autoregressive model the same way (no card)."""
    state = plain_state(causal_lm, dtype)
    save_folder_atomically(folder, lambda fresh: _write(fresh, causal_lm, state, tokenizer))


def plain_state(causal_lm: PreTrainedModel, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Detached weights under their Transformers names, a tied head left out, adapters merged, 4-bit layers unpacked
    (to fp32, unless `dtype` says otherwise).

    One layer is computed at a time and laid in the computer's memory, so that a model whose plain weights do not fit
    the device can be saved from it.
    """
    adapters = {f"{name}.base_layer.weight": part for name, part in causal_lm.named_modules() if _is_adapter(part)}
    packed = {f"{name}.weight": part for name, part in causal_lm.named_modules() if isinstance(part, Nf4Linear)}
    state: dict[str, Tensor] = {}
    for name, tensor in causal_lm.state_dict().items():
        if any(part in name for part in ADAPTER_PARTS) or (name == HEAD and is_tied(causal_lm)):
            continue
        plain = packed[name].unpacked() if name in packed else tensor.detach()
        delta = _delta(adapters[name]) if name in adapters else None
        if delta is not None:
            plain = (plain.float() + delta.float()).to(plain.dtype)
        if dtype is not None and plain.is_floating_point():
            plain = plain.to(dtype)
        computed = name in packed or delta is not None
        state[name.replace(".base_layer.", ".")] = (plain.cpu() if computed else plain).contiguous()
    return state


def _is_adapter(module: Any) -> bool:
    return hasattr(module, "get_delta_weight") and hasattr(module, "base_layer")


def _delta(adapter: Any) -> Tensor | None:
    """What an injected LoRA adapter adds to the weight it wraps."""
    parts = [adapter.get_delta_weight(name).detach() for name in getattr(adapter, "active_adapters", ())]
    return torch.stack(parts).sum(0) if parts else None


def rehearse_save(
    folder: str | Path, model: DiffusionModel, tokenizer: PreTrainedTokenizerBase, copies: int = 1
) -> None:
    """Try before a training what could fail after it: write a checkpoint without its weights into `folder`, take it
    away again, and see that there is room for `copies` whole ones in fp32.

    Raises `CheckpointError`.
    """
    folder = Path(folder)
    embedding = model.causal_lm.get_input_embeddings().weight
    needed = copies * 4 * sum(part.numel() for part in model.causal_lm.parameters())
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="trying-to-save-", dir=folder) as fresh:
            _write(Path(fresh), model.causal_lm, {EMBEDDING: embedding.detach()[:0]}, tokenizer, len(embedding))
            (Path(fresh) / CARD).write_text(card_text(model.card), encoding="utf-8")
            read_card(fresh)
        free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{str(folder)!r} has room for {free >> 20} MiB, the checkpoints take {needed >> 20}",
            "free some space, or give another folder",
        )


def _write(
    folder: Path,
    causal_lm: PreTrainedModel,
    state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    rows: int | None = None,
) -> None:
    """`rows` are the embedding's, where `state` is not all there is."""
    save_tensors(state, folder / WEIGHTS)
    rows = rows if rows is not None else len(state[EMBEDDING])
    config = _config_text(causal_lm, rows, state[EMBEDDING].dtype)
    (folder / "config.json").write_text(config, encoding="utf-8")
    shutil.copymode(folder / "config.json", folder / WEIGHTS)  # safetensors writes for the owner alone
    # As it was: `save_pretrained` refuses settings that contradict each other, as Llama 2's do.
    generation = causal_lm.generation_config.to_json_string()
    (folder / "generation_config.json").write_text(generation, encoding="utf-8")
    save_tokenizer(tokenizer, folder)


def save_tensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file. Raises `OSError`, as any other writing does."""
    try:
        save_file(dict(state), str(path), metadata={"format": "pt"})
    except SafetensorError as problem:  # it wraps the system's error in words
        full = "No space left" in str(problem) or "code: 28" in str(problem)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(problem)) from None


def _config_text(causal_lm: PreTrainedModel, rows: int, dtype: torch.dtype) -> str:
    """`config.json` with the field names of both supported major versions of Transformers."""
    fields: dict[str, Any] = json.loads(causal_lm.config.to_json_string(use_diff=False))
    fields["architectures"] = [type(causal_lm).__name__]
    fields["dtype"] = fields["torch_dtype"] = str(dtype).removeprefix("torch.")
    fields["vocab_size"] = rows
    fields["tie_word_embeddings"] = is_tied(causal_lm)  # what the weights are, whatever the parent's file said
    rope = fields.get("rope_parameters")
    if isinstance(rope, dict):
        fields["rope_theta"] = rope.get("rope_theta", 10000.0)
        plain = rope.get("rope_type", "default") == "default"
        fields["rope_scaling"] = None if plain else {key: value for key, value in rope.items() if key != "rope_theta"}
    for key in (
        "_name_or_path",
        "_attn_implementation",
        "_attn_implementation_internal",
        "quantization_config",
        "auto_map",
    ):
        fields.pop(key, None)
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def read_state(folder: str | Path) -> dict[str, Tensor]:
    """All weights of a folder, as stored. Raises `ModelError` for a file that is missing or cut short."""
    state: dict[str, Tensor] = {}
    for path in weight_files(Path(folder)):
        check_safetensors(path)
        with safe_open(str(path), framework="pt") as file:
            state.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no mapping)
    return state


def merge_checkpoints(folders: Sequence[str | Path]) -> dict[str, Tensor]:
    """Arithmetic mean of the weights of several checkpoints, in fp32.

    Raises `CheckpointError` where the cards, the names or the shapes differ. Sums run in fp64, so that
    averaging copies of one checkpoint returns it bit for bit.

    Paper: WSM, arXiv:2507.17634, as used by LLaDA2.0, arXiv:2512.15745 (top-k merge).
    """
    if not folders:
        raise CheckpointError("nothing to merge", "name at least one checkpoint")
    card = read_card(folders[0])
    total: dict[str, Tensor] = {}
    for folder in folders:
        state = read_state(folder)
        if read_card(folder) != card:
            raise CheckpointError(f"{str(folder)!r} has another card than {str(folders[0])!r}", ONE_RUN)
        if total and _shapes(state) != _shapes(total):
            raise CheckpointError(f"{str(folder)!r} and {str(folders[0])!r} hold different weights", ONE_RUN)
        for name, tensor in state.items():
            total[name] = tensor.double() if name not in total else total[name] + tensor.double()
    return {name: (tensor / len(folders)).float() for name, tensor in total.items()}


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def load_weights(model: DiffusionModel, state: Mapping[str, Tensor]) -> None:
    """Copy a state from `merge_checkpoints` or `read_state` into a model. Raises `CheckpointError` on other names."""
    report = model.causal_lm.load_state_dict(dict(state), strict=False)
    tied = {HEAD} if is_tied(model.causal_lm) else set()
    missing = sorted(set(report.missing_keys) - tied)
    if missing or report.unexpected_keys:
        wrong = [*missing, *report.unexpected_keys][0]
        raise CheckpointError(f"the weights do not fit the model ({wrong})", "use a checkpoint of this model")
