"""Draft adapters on disk: written whole or not at all, and loaded only beside the parent that they were trained for."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import LoraConfig as PeftLoraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hildanext.core.errors import CheckpointError
from hildanext.core.run_dir import disk_errors, save_folder_atomically
from hildanext.models.card import CARD
from hildanext.models.checkpoint import save_tensors
from hildanext.models.draft_card import DraftCard, draft_card_text, read_draft_card
from hildanext.models.drafter import Drafter
from hildanext.models.gated_lora import gated_layers
from hildanext.models.loading.files import check_safetensors, weights_hash
from hildanext.models.loading.load import load_parent
from hildanext.models.loading.names import NAMES, is_hub_id, locate, locate_drafts

ADAPTER = "adapter_model.safetensors"
PLACES = "places.safetensors"
VOCABULARY = "vocabulary"
PREFIX = "base_model.model."
"""What peft puts before the names of the layers that it wraps."""


def save_drafts(folder: str | Path, drafter: Drafter, card: DraftCard, dtype: torch.dtype | None = None) -> None:
    """Write adapters and card, nothing of the parent; `dtype` None keeps the adapters' own.

    Raises `CheckpointError` (out of disk, not writable).
    """

    def stored(part: Tensor) -> Tensor:
        return part.detach().to("cpu", dtype).contiguous()

    state = {}
    for name, layer in gated_layers(drafter.causal_lm):
        state[f"{PREFIX}{name}.lora_A.weight"] = stored(layer.lora_A)
        state[f"{PREFIX}{name}.lora_B.weight"] = stored(layer.lora_B)
    layers = range(drafter.enter, len(drafter.causal_lm.model.layers))
    lora = card.lora
    peft = PeftLoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=sorted(lora.targets), bias="none",  # type: ignore[arg-type]
        layers_to_transform=list(layers), base_model_name_or_path=card.parent, task_type="CAUSAL_LM",
    )  # fmt: skip

    def write(fresh: Path) -> None:
        save_tensors(state, fresh / ADAPTER)
        beside = {name: stored(part) for name, part in _beside(drafter).items()}
        if drafter.draft_tokens is not None:
            beside[VOCABULARY] = drafter.draft_tokens.cpu()
        save_tensors(beside, fresh / PLACES)
        peft.save_pretrained(str(fresh))
        (fresh / CARD).write_text(draft_card_text(card), encoding="utf-8")
        for file in (ADAPTER, PLACES):  # safetensors writes for the owner alone
            shutil.copymode(fresh / CARD, fresh / file)

    save_folder_atomically(folder, write)


def refuse_without_drafts(name: str) -> None:
    """Raise for a model that nobody has trained draft adapters for: `CheckpointError`, or `ModelError` for none."""
    place = None if name in NAMES or is_hub_id(name) else locate(name)
    if place is not None and (place / CARD).is_file():
        raise CheckpointError(
            f"{name!r} is a diffusion checkpoint that keeps no parent to be exact to",
            "give draft adapters (convert with convert.keep_parent), or its parent with --drafter ngram",
        )
    raise CheckpointError(
        f"{name!r} has no draft adapters",
        "train them (convert with convert.keep_parent) and give their folder, or draft from the text: --drafter ngram",
    )


def rehearse_drafts(folder: str | Path, drafter: Drafter, card: DraftCard) -> None:
    """Try before a training what could fail after it: write the adapters into `folder` and take them away again.

    Raises `CheckpointError`.
    """
    with disk_errors(Path(folder)):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="trying-to-save-", dir=folder) as fresh:
            save_drafts(Path(fresh) / "drafts", drafter, card)
            read_draft_card(Path(fresh) / "drafts")


def load_drafts(
    name: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    parent: str | Path | None = None,
) -> tuple[Drafter, PreTrainedTokenizerBase, DraftCard]:
    """The adapters of a folder in their parent, which `parent` names where the card's name is not here.

    Raises `CheckpointError` where the folder is no whole set of adapters or the parent is another one, `ModelError`
    where the parent cannot be had.
    """
    folder = locate_drafts(str(name))
    card = read_draft_card(folder)
    home = str(parent) if parent is not None else card.parent
    found = weights_hash(locate(home))
    if found != card.parent_hash:
        raise CheckpointError(
            f"the drafts of {str(name)!r} are of another parent than {home!r} (weights {found[:12]}, trained beside "
            f"{card.parent_hash[:12]})",
            f"name the parent they were trained beside ({card.parent})",
        )
    causal_lm, tokenizer = load_parent(home, dtype, device)
    shape = (card.lora, card.places, card.enter, card.shared_place, card.sampler, card.vocabulary)
    drafter = Drafter(causal_lm, *shape)
    load_adapters(drafter, folder)
    return drafter.eval().requires_grad_(False), tokenizer, card


def _beside(drafter: Drafter) -> dict[str, torch.nn.Parameter]:
    """What is learnt beside the adapters, by the names it has on disk."""
    sampler = {} if drafter.sampler is None else dict(drafter.sampler.named_parameters(prefix="sampler"))
    return {"places": drafter.place_vectors, **sampler}


@torch.no_grad()
def load_adapters(drafter: Drafter, folder: Path) -> None:
    """Copy a folder's adapters into a drafter. Raises `CheckpointError` where they do not fit."""
    for file in (ADAPTER, PLACES):
        if not (folder / file).is_file():
            raise CheckpointError(f"{str(folder)!r} has no {file}", "copy the checkpoint again")
        check_safetensors(folder / file)
    state = load_file(folder / ADAPTER)
    wanted: dict[str, Tensor] = {
        f"{PREFIX}{name}.{part}.weight": parameter
        for name, layer in gated_layers(drafter.causal_lm)
        for part, parameter in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B))
    }
    wanted |= _beside(drafter)
    state |= load_file(folder / PLACES)
    if drafter.draft_tokens is not None:
        wanted[VOCABULARY] = drafter.draft_tokens
    odd = sorted(state.keys() ^ wanted.keys())
    odd += [key for key in state.keys() & wanted.keys() if state[key].shape != wanted[key].shape]
    if odd:
        raise CheckpointError(f"{str(folder)!r}: the adapters do not fit the card ({odd[0]})", "copy it again")
    ids = state.get(VOCABULARY)
    if ids is not None and (ids.dtype != torch.int64 or not 0 <= int(ids.min()) <= int(ids.max()) < len(drafter.head)):
        raise CheckpointError(
            f"{str(folder)!r}: the ids of its vocabulary are none of the parent's {len(drafter.head)} tokens",
            "copy it again",
        )
    for key, parameter in wanted.items():
        parameter.copy_(state[key])
