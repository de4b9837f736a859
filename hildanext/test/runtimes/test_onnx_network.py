"""The network in ONNX Runtime: torch's numbers in fp32, rows that do not depend on each other, and exact text."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
pytest.importorskip("onnx", reason="the extra onnx is not installed")

import hildanext.export.onnx_export as onnx_export
from exact_stubs import Always
from hildanext.core.errors import CheckpointError
from hildanext.decoding.exact.expected import all_points, last_point
from hildanext.decoding.exact.network import TorchNetwork
from hildanext.decoding.exact.policy import ExactConfig
from hildanext.exact import generate_exact
from hildanext.export.network_weights import weights_of
from hildanext.export.onnx_layout import DRAFT_ROWS
from hildanext.export.smoothing import activation_peaks, smooth
from hildanext.inference import GenerationConfig
from hildanext.kv_cache.draft_attention import DraftSegment
from hildanext.models.drafter import Drafter
from hildanext.runtimes.onnx_network import OnnxNetwork, skeleton
from hildanext.runtimes.onnx_parent import OnnxParent
from onnx_exports import small_network, small_source

TOKENS = [5, 9, 12, 33, 2, 7, 41]
PROMPTS = [[3, 4, 5, 6], [7, 8, 9], [10, 11, 12, 13, 14, 20, 21] * 3]
PRECISIONS = ["fp32", "q8", "q4"]


@pytest.mark.parametrize(("family", "enter"), [*itertools.product(["llama", "qwen2", "qwen3"], [0, 1])])
def test_in_fp32_clean_rows_masks_and_keys_are_torchs(tmp_path: Path, family: str, enter: int) -> None:
    source = small_source(family, enter, sampler=6)
    assert isinstance(source.drafter, Drafter)
    results = []
    for network in (TorchNetwork(source.drafter), small_network(tmp_path / "out", source, "fp32")):
        cache = network.new_cache(60)
        with torch.inference_mode():
            first = network.forward(TOKENS[:4], [cache], [DraftSegment(0, 4, (), 0)])
            second = network.forward(TOKENS[4:], [cache], [DraftSegment(4, 3, (0, 2), 3)])
            told = network.told(second[-2:], torch.tensor([3, 4]))
            keys, values = cache.keys[:, :, :7], cache.values[:, :, :7]
            ids, rows = network.shortlist(second[None, -2:], 5)
            results.append((first, second, told, network.logits(second), keys, values, ids, rows.float()))
    for wanted, given in zip(*results, strict=True):
        torch.testing.assert_close(given, wanted, atol=1e-3 if given is results[1][-1] else 1e-4, rtol=1e-3)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_drafts_are_of_the_draft_vocabulary(tmp_path: Path, precision: str) -> None:
    network = small_network(tmp_path / "out", small_source(vocabulary=20), precision)
    ids, rows = network.shortlist(torch.randn(2, 3, network.card.hidden), 64)
    assert ids.shape == (2, 3, 20) and set(ids.flatten().tolist()) == set(range(0, 40, 2))
    head = small_source().causal_lm.get_output_embeddings().weight
    torch.testing.assert_close(rows.float(), head[ids].float(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("change", "said"), [("gone", "is not there"), ("other", "no export that this version reads")])
def test_rows_of_drafts_that_are_not_whole_are_one_line(tmp_path: Path, change: str, said: str) -> None:
    network = small_network(tmp_path / "out", small_source(), "fp32")
    file = tmp_path / "out" / DRAFT_ROWS
    file.unlink() if change == "gone" else save_file({"ids": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match=said):
        OnnxNetwork(tmp_path / "out", network.card, skeleton(tmp_path / "out"), 1)


@pytest.mark.parametrize(("precision", "enter", "shared"), [*itertools.product(PRECISIONS, [0, 1], [1, 2])])
def test_rows_together_are_bit_for_bit_the_rows_alone(tmp_path: Path, precision: str, enter: int, shared: int) -> None:
    """Whatever stands beside them, and on both sides of a piece of the cache's slots."""
    source = small_source("qwen3", enter, num_key_value_heads=4 // shared)
    network = small_network(tmp_path / "out", source, precision)
    begin = 58  # masks reach into the next piece of slots, which the rows alone do not look at
    before = [TOKENS[i % 7] for i in range(begin)]
    caches = [network.new_cache(90) for _ in range(4)]
    for cache in caches:
        network.forward(before, [cache], [DraftSegment(0, begin, (), 0)])
    together = network.forward(TOKENS[:4], [caches[0]], [DraftSegment(begin, 4, (0, 1, 3), 3)])
    for row, token in enumerate(TOKENS[:4]):
        alone = network.forward([token], [caches[1]], [DraftSegment(begin + row, 1, (), 0)])
        assert torch.equal(alone[0], together[row])
        assert torch.equal(network.logits(alone)[0], network.logits(together)[row])
    one, two = DraftSegment(begin, 1, (0,), 3), DraftSegment(begin, 2, (1,), 3)
    both = network.forward([TOKENS[0], *TOKENS[:2]], caches[2:], [one, two])
    first = network.forward(TOKENS[:1], [caches[0]], [one])
    second = network.forward(TOKENS[:2], [caches[1]], [two])
    assert torch.equal(both, torch.cat([first[:1], second[:2], first[1:], second[2:]]))
    if precision == "fp32":  # a group's own slots lie elsewhere, so that its sums are in another order
        torch.testing.assert_close(second[2:], together[7:10], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_exact_text_is_the_onnx_parents_token_for_token(tmp_path: Path, precision: str) -> None:
    network = small_network(tmp_path / "out", small_source(sampler=6), precision)
    settings = GenerationConfig(max_new_tokens=70, batch_size=2, ignore_eos=True)

    def text(placing: Always | None, **knobs: Any) -> list[list[int]]:
        config = ExactConfig(**knobs)
        return [result.tokens for result in generate_exact(network, None, PROMPTS, config, settings, placing)]

    wanted = text(None, drafter="none")
    for placing in (all_points(1), all_points(2), last_point(3), all_points(3)):
        assert text(Always(placing)) == wanted
    assert text(None, drafter="ngram") == wanted
    assert text(None, drafter="both", after="all") == wanted


def test_matrices_for_processors_that_saturate_give_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed = small_network(tmp_path / "signed", small_source(), "q8")
    monkeypatch.setattr(onnx_export, "has_dot_products", lambda: False)
    unsigned = small_network(tmp_path / "unsigned", small_source(), "q8")
    assert unsigned.card.unsigned and not signed.card.unsigned
    one, other = (
        net.forward(TOKENS, [net.new_cache(40)], [DraftSegment(0, 7, (2, 6), 3)]) for net in (signed, unsigned)
    )
    assert torch.equal(one, other)


def test_smoothing_changes_nothing_in_exact_arithmetic(tmp_path: Path) -> None:
    source = small_source("qwen2")
    weights, plain = weights_of(source.drafter), weights_of(source.drafter)
    smooth(weights, activation_peaks(source.causal_lm, source.tokenizer))
    for layer, before in zip(weights.layers, plain.layers, strict=True):
        assert abs(layer.linear["qkv"] - before.linear["qkv"]).max() > 1e-3
        for norm, kind in (("attention", "qkv"), ("mlp", "gate_up")):
            inputs = layer.norms[norm] * layer.linear[kind][:48]
            wanted = before.norms[norm] * before.linear[kind][:48]
            torch.testing.assert_close(torch.from_numpy(inputs), torch.from_numpy(wanted), rtol=1e-4, atol=1e-6)
        product, wanted = (
            part.linear["down"].T * part.linear["gate_up"][48:] * part.norms["mlp"] for part in (layer, before)
        )
        torch.testing.assert_close(torch.from_numpy(product), torch.from_numpy(wanted), rtol=1e-4, atol=1e-6)


def test_the_engines_parent_writes_what_exact_mode_writes(tmp_path: Path) -> None:
    from hildanext.kv_cache import BlockCache, CachedAttention
    from hildanext.kv_cache.segments import Segment

    network = small_network(tmp_path / "out", small_source(), "q8")
    parent = OnnxParent(network, None)
    cache, other = BlockCache.of_parent(parent, 40), network.new_cache(40)
    attention = CachedAttention([cache], [Segment(0, 7, 0)])
    hidden = parent.forward(torch.tensor([TOKENS]), attention.positions, attention)[0]
    assert torch.equal(hidden, network.forward(TOKENS, [other], [DraftSegment(0, 7, (), 0)]))
    cache.commit(7)
    copy = BlockCache.of_parent(parent, 60)
    copy.adopt(cache, 7)
    step = CachedAttention([copy], [Segment(7, 1, 0)])
    following = parent.forward(torch.tensor([[3]]), step.positions, step)[0]
    assert torch.equal(following, network.forward([3], [other], [DraftSegment(7, 1, (), 0)]))
