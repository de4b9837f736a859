"""An export, looked at before anybody relies on it: the same numbers as torch in fp32, near ones in 8 and 4 bits."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hildanext.core.errors import CheckpointError
from hildanext.core.run_dir import write_atomically
from hildanext.decoding.exact.network import Network, TorchNetwork
from hildanext.export.onnx_card import Distance, OnnxCard, Precision, onnx_card_text
from hildanext.export.onnx_export import Source, export_onnx
from hildanext.export.smoothing import drawn_documents
from hildanext.kv_cache.draft_attention import DraftSegment
from hildanext.models.card import CARD
from hildanext.models.drafter import Drafter
from hildanext.runtimes.onnx_network import OnnxNetwork, skeleton

FARTHEST = 1e-3
"""Logits of an fp32 export may be so far from torch's, over the largest of them."""
SEED = 1
"""Of the documents that are looked at; those that set the smoothing had another."""


def export_checked(name: str, folder: str | Path, precision: Precision, parent: str | None = None) -> OnnxCard:
    """Export, then compare with torch and note the distance in the card.

    Raises as `export_onnx`, and `CheckpointError` for an fp32 export that computes something else.
    """
    card, source = export_onnx(name, folder, precision, parent)
    folder = Path(folder)
    network = OnnxNetwork(folder, card, skeleton(folder), torch.get_num_threads())
    distance, farthest = _distance(network, source)
    if precision == "fp32" and not farthest < FARTHEST:
        raise CheckpointError(
            f"the export of {name!r} is {farthest:.1e} from torch", "report it, and keep to --runtime torch"
        )
    card = replace(card, distance=distance)
    write_atomically(folder / CARD, onnx_card_text(card))
    return card


@torch.inference_mode()
def _distance(network: OnnxNetwork, source: Source) -> tuple[Distance, float]:
    drafter = source.drafter if isinstance(source.drafter, Drafter) else Drafter(source.causal_lm, None)
    known, found = TorchNetwork(drafter.eval()), []
    for document in drawn_documents(source.causal_lm, source.tokenizer, SEED):
        wanted, given = (_logits(each, document) for each in (known, network))
        farthest = (wanted - given).abs().max() / wanted.abs().max()
        p, q = wanted.log_softmax(-1), given.log_softmax(-1)
        more = (p - q).gather(1, torch.tensor(document[1:])[:, None])[:, 0]
        kl = (p.exp() * (p - q)).sum(-1)
        same = (p.argmax(-1) == q.argmax(-1)).float()
        found.append(torch.stack([more, kl, same, farthest.expand_as(more)]))
    if not found:  # the model draws nothing but empty documents
        return Distance(nats=0.0, kl=0.0, argmax=1.0), 0.0
    whole = torch.cat(found, 1)
    nats, divergence, agree, _ = whole.mean(1).tolist()
    return Distance(nats=nats, kl=divergence, argmax=agree), float(whole[3].max())


def _logits(network: Network, document: list[int]) -> Tensor:
    """Behind every token but the last."""
    cache = network.new_cache(len(document))
    return network.logits(network.forward(document[:-1], [cache], [DraftSegment(0, len(document) - 1, (), 0)]))
