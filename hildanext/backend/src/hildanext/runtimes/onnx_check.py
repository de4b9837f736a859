"""An export, looked at before anybody relies on it: the same numbers as torch in fp32, near ones in 8 and 4 bits."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hildanext.core.errors import CheckpointError
from hildanext.core.run_dir import write_atomically
from hildanext.decoding.exact.network import Network, TorchNetwork
from hildanext.export.onnx_card import Distance, OnnxCard, Precision, onnx_card_text
from hildanext.export.onnx_export import Source, open_source, write_source
from hildanext.export.smoothing import drawn_documents, watched_peaks
from hildanext.kv_cache.draft_attention import DraftSegment
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.card import CARD
from hildanext.models.drafter import Drafter
from hildanext.runtimes.drawn_blocks import drawn_blocks, masked_logits
from hildanext.runtimes.onnx_blocks import OnnxDiffusion
from hildanext.runtimes.onnx_network import OnnxNetwork, skeleton

FARTHEST = 1e-3
"""Logits of an fp32 export may be so far from torch's, over the largest of them."""
SEED = 1
"""Of the documents that are looked at; those that set the smoothing had another."""
Compared = tuple[Tensor, Tensor, list[int]]
"""Logits by torch, the same by ONNX Runtime, and the tokens that stand there."""


def export_checked(
    name: str, folder: str | Path, precision: Precision, parent: str | None = None, diffusion: bool = False
) -> OnnxCard:
    """Export, then compare with torch and note the distance in the card. `diffusion` as in `cached_export`.

    Raises as `open_source` and `write_source`, and `CheckpointError` for an fp32 export that computes something else.
    """
    source, home, digest = open_source(name, parent, diffusion)
    peaks = None
    if source.diffusion is not None and precision == "q8":
        with watched_peaks(source.causal_lm) as peaks:
            drawn_blocks(source.diffusion, source.tokenizer)
    card, folder = write_source(source, folder, precision, home, digest, peaks), Path(folder)
    network = OnnxNetwork(folder, card, skeleton(folder), torch.get_num_threads())
    compared = _masks(network, source.diffusion, source) if source.diffusion is not None else _tokens(network, source)
    distance, farthest = _distance(compared)
    if precision == "fp32" and not farthest < FARTHEST:
        raise CheckpointError(
            f"the export of {name!r} is {farthest:.1e} from torch", "report it, and keep to --runtime torch"
        )
    card = replace(card, distance=distance)
    write_atomically(folder / CARD, onnx_card_text(card))
    return card


def _distance(compared: Iterator[Compared]) -> tuple[Distance, float]:
    """Means over tokens, and how far single logits are apart. Tokens that may not be said are -inf in both."""
    found = []
    for wanted, given, targets in compared:
        known = wanted.isfinite()
        farthest = torch.where(known, wanted - given, 0.0).abs().max() / wanted[known].abs().max()
        p, q = wanted.log_softmax(-1), given.log_softmax(-1)
        more = (p - q).gather(1, torch.tensor(targets)[:, None])[:, 0]
        kl = torch.where(known, p.exp() * (p - q), 0.0).sum(-1)
        same = (p.argmax(-1) == q.argmax(-1)).float()
        found.append(torch.stack([more, kl, same, farthest.expand_as(more)]))
    if not found:  # the model draws nothing but empty documents
        return Distance(nats=0.0, kl=0.0, argmax=1.0), 0.0
    whole = torch.cat(found, 1)
    nats, divergence, agree, _ = whole.mean(1).tolist()
    return Distance(nats=nats, kl=divergence, argmax=agree), float(whole[3].max())


def _tokens(network: OnnxNetwork, source: Source) -> Iterator[Compared]:
    drafter = source.drafter if isinstance(source.drafter, Drafter) else Drafter(source.causal_lm, None)
    known = TorchNetwork(drafter.eval())
    for document in drawn_documents(source.causal_lm, source.tokenizer, SEED):
        yield _logits(known, document), _logits(network, document), document[1:]


def _masks(network: OnnxNetwork, model: DiffusionModel, source: Source) -> Iterator[Compared]:
    exported = OnnxDiffusion(network, model.card)
    for document in drawn_blocks(model, source.tokenizer, SEED):
        wanted, targets = masked_logits(model, document)
        if targets:
            yield wanted, masked_logits(exported, document)[0], targets


@torch.inference_mode()
def _logits(network: Network, document: list[int]) -> Tensor:
    """Behind every token but the last."""
    cache = network.new_cache(len(document))
    return network.logits(network.forward(document[:-1], [cache], [DraftSegment(0, len(document) - 1, (), 0)]))
