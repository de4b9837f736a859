"""An exported network on disk: three graphs over one file of weights, the card, and the model's configuration and
tokenizer. A card stands in every graph's metadata, too, so that a graph is known for ours.

    clean.onnx  rows of the parent          both.onnx  with masks and adapters behind them (drafts only)
    head.onnx   states to logits
    draft_head.onnx  states of masks to the tokens they are likeliest to say; draft_rows.safetensors, those tokens' rows
    sampler.onnx     the sampler head, where there is one
    weights.bin, hilda.json, config.json, tokenizer files
"""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import torch
from onnx import TensorProto
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hildanext.core.run_dir import save_folder_atomically
from hildanext.export.network_weights import NetworkWeights
from hildanext.export.onnx_card import OnnxCard, onnx_card_text
from hildanext.export.onnx_graph import GraphKind, draft_head_graph, head_graph, network_graph, sampler_graph
from hildanext.export.onnx_layout import BOTH, CLEAN, DRAFT_HEAD, DRAFT_ROWS, HEAD, SAMPLER, WEIGHTS
from hildanext.models.card import CARD
from hildanext.models.checkpoint import save_tensors

OUTSIDE = 1024
"""Constants of more bytes than this lie in the file of weights."""
PAGE = 4096


def save_onnx(
    folder: str | Path,
    weights: NetworkWeights,
    card: OnnxCard,
    causal_lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write it whole or not at all. Raises `CheckpointError` (out of disk, not writable)."""

    def write(fresh: Path) -> None:
        causal_lm.config.save_pretrained(fresh)
        if causal_lm.generation_config is not None:
            causal_lm.generation_config.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        (fresh / CARD).write_text(onnx_card_text(card), encoding="utf-8")
        if weights.places is not None:
            save_tensors(_draft_rows(weights), fresh / DRAFT_ROWS)
        with (fresh / WEIGHTS).open("wb") as file:
            places: dict[str, tuple[int, int]] = {}
            alone, behind = (GraphKind(card.dtype, masks, card.unsigned) for masks in (False, True))
            _write(fresh / CLEAN, network_graph(weights, alone), file, places, card)
            if weights.places is not None:
                _write(fresh / BOTH, network_graph(weights, behind), file, places, card)
                _write(fresh / DRAFT_HEAD, draft_head_graph(weights, alone), file, places, card)
            if weights.sampler is not None:
                _write(fresh / SAMPLER, sampler_graph(weights, alone), file, places, card)
            _write(fresh / HEAD, head_graph(weights, alone), file, places, card)

    save_folder_atomically(folder, write)


def _draft_rows(weights: NetworkWeights) -> dict[str, torch.Tensor]:
    """The output matrix's rows of the tokens that drafts may say, and where each token's row is (-1: it has none)."""
    vocabulary, chosen = len(weights.head), weights.draft_tokens
    if chosen is None:
        chosen = np.arange(vocabulary)
    at = torch.full((vocabulary,), -1, dtype=torch.long)
    at[torch.from_numpy(chosen)] = torch.arange(len(chosen))
    return {"rows": torch.from_numpy(weights.head[chosen]).half(), "at": at}


def _write(
    path: Path, graph: onnx.ModelProto, file: BinaryIO, places: dict[str, tuple[int, int]], card: OnnxCard
) -> None:
    """Constants that another graph has under the same name are the same, and lie in the file once."""
    for tensor in graph.graph.initializer:
        if len(tensor.raw_data) <= OUTSIDE:
            continue
        if tensor.name not in places:
            file.write(bytes(-file.tell() % PAGE))
            places[tensor.name] = (file.tell(), len(tensor.raw_data))
            file.write(tensor.raw_data)
        offset, length = places[tensor.name]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", WEIGHTS), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
    graph.metadata_props.add(key=CARD, value=onnx_card_text(card))
    path.write_bytes(graph.SerializeToString())
