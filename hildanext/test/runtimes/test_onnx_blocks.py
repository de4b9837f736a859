"""Block diffusion in ONNX Runtime: in fp32 torch's numbers and text, in all types rows that are as if alone."""

import itertools
from pathlib import Path

import pytest
import torch

pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
pytest.importorskip("onnx", reason="the extra onnx is not installed")

from decoding_stubs import StubTokenizer
from hildanext.core.errors import ConfigError, ModelError
from hildanext.decoding import S2D2, Decoder, Residual, ThresholdEdit, decoder_section, make_decoder
from hildanext.decoding.state import DecodeState
from hildanext.engine.base import Request, complete
from hildanext.engine.local import LocalEngine, LocalEngineConfig
from hildanext.inference import GenerationConfig, generate
from hildanext.kv_cache import BlockCache, CachedAttention, Segment
from hildanext.models.bidirectional import DiffusionModel
from onnx_exports import small_blocks, small_exported_blocks

PROMPTS = [[3, 4, 6], [7, 8, 9, 10, 11, 12, 13, 14, 20, 21] * 5, [10]]
PRECISIONS = ["fp32", "q8", "q4"]
ALIGNMENTS = ["block", "parent"]
MODES = {mode: make_decoder(decoder_section(mode)) for mode in ("S_MODE", "Q_MODE")}


def texts(model: DiffusionModel, decoder: Decoder, prompts: list[list[int]] = PROMPTS, new: int = 40, **settings):
    config = GenerationConfig(max_new_tokens=new, debug=True, **settings)
    return [result.tokens for result in generate(model, None, prompts, decoder, config)]


@pytest.mark.parametrize(
    ("family", "alignment", "changes"),
    [
        ("llama", "block", {}),
        ("qwen2", "parent", {}),
        ("qwen3", "block", {"tied": False}),
        ("qwen3", "parent", {"tied": False}),
        ("llama", "parent", {"num_key_value_heads": 4}),
    ],
)
def test_in_fp32_the_text_is_torchs(tmp_path: Path, family: str, alignment: str, changes: dict) -> None:
    """Prompts and texts on both sides of 64 slots, blocks that are edited, and ones that are read again."""
    source = small_blocks(family, alignment, **changes)
    exported = small_exported_blocks(tmp_path / "out", source, "fp32")
    for decoder in (*MODES.values(), ThresholdEdit(tau_mask=0.3, tau_edit=0.2, max_post=2, window=2)):
        wanted = texts(source.diffusion, decoder)
        assert texts(exported, decoder) == wanted
        assert len({token for text in wanted for token in text}) > 5


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_in_fp32_states_keys_and_logits_are_torchs(tmp_path: Path, alignment: str) -> None:
    source = small_blocks("qwen3", alignment, tied=False)
    exported = small_exported_blocks(tmp_path / "out", source, "fp32")
    tokens = torch.arange(6, 30)[None]
    tokens[0, 22:] = source.diffusion.card.mask_id
    results = []
    for model in (source.diffusion, exported):
        caches = [BlockCache.of(model, 24), BlockCache.of(model, 24)]
        with torch.inference_mode():
            first = CachedAttention(caches, [Segment(0, 12, 0), Segment(0, 4, 0)])
            model.hidden(torch.cat([tokens[:, :12], tokens[:, :4]], 1), first.positions, first)
            second = CachedAttention(caches, [Segment(12, 8, 4), Segment(4, 0, 4)])
            fed = torch.cat([tokens[:, 12:24], tokens[:, 4:8]], 1)
            hidden = model.hidden(fed, second.positions, second)
            logits = model.logits(hidden)
            assert model.logits(hidden[:, :0]).shape == (1, 0, 64)
        banned = logits.isinf()
        assert banned[0, :, [5, 60, 61, 62, 63]].all() and banned.sum() == 5 * fed.shape[1]
        keys = torch.cat([cache.keys[:, :, :end] for cache, end in zip(caches, (24, 8), strict=True)], 2)
        results.append((hidden, logits.masked_fill(banned, 0.0), keys))
    for wanted, given in zip(*results, strict=True):
        torch.testing.assert_close(given, wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("precision", "alignment"), [*itertools.product(PRECISIONS, ALIGNMENTS)])
def test_a_batch_writes_what_each_row_writes_alone(tmp_path: Path, precision: str, alignment: str) -> None:
    """Bit for bit: prompts that are fed in other pieces, and blocks beside others, leave the same keys and logits."""
    exported = small_exported_blocks(tmp_path / "out", small_blocks("llama", alignment), precision)
    for decoder in MODES.values():
        together = texts(exported, decoder)
        assert together == [texts(exported, decoder, [prompt])[0] for prompt in PROMPTS]
    prompt, caches = PROMPTS[1][:48], []
    for budget in (4, 20, 1000):
        state = DecodeState(exported, [prompt, PROMPTS[1]], [60, 60], lambda *_: False)
        row = state.joining[0]
        while state.joining:
            state.prefill_step(budget)
        caches.append((row.cache.keys[:, :, :48], row.cache.values[:, :, :48], row.last_clean_hidden))
    for other in caches[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(caches[0], other, strict=True))


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_drafts_of_a_block_are_verified_as_in_torch(tmp_path: Path, alignment: str) -> None:
    source = small_blocks("llama", alignment)
    exported = small_exported_blocks(tmp_path / "out", source, "fp32")
    assert texts(exported, S2D2()) == texts(source.diffusion, S2D2())


def test_what_needs_torch_is_refused_in_one_line(tmp_path: Path) -> None:
    exported = small_exported_blocks(tmp_path / "out", small_blocks(), "q8")
    with pytest.raises(ModelError, match="cached generation alone"):
        texts(exported, MODES["S_MODE"], cached=False)
    with pytest.raises(ModelError, match="cached generation alone"):
        exported.embed(torch.tensor([[3]]))


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_the_engine_answers_with_it(tmp_path: Path, alignment: str) -> None:
    """Requests beside each other, a prefix taken over, and likelihoods of the block-size-1 mode where there is one."""
    exported = small_exported_blocks(tmp_path / "out", small_blocks("llama", alignment), "q8")
    decoder = decoder_section("S_MODE")
    engine = LocalEngine(exported, StubTokenizer(bos=0), None, LocalEngineConfig(prefill_tokens=8))
    try:
        assert engine.facts.dtype == "q8"
        for prompt in (PROMPTS[1], PROMPTS[1], PROMPTS[0]):
            request = Request(tokens=tuple(prompt), max_new_tokens=20, decoder=decoder, ignore_eos=True)
            answer = complete(engine, request)
            assert answer.tokens == texts(exported, make_decoder(decoder), [prompt], 20)[0]
        if alignment == "parent":
            scored = complete(engine, Request(tokens=tuple(PROMPTS[0]), max_new_tokens=3, scores=True))
            assert scored.scores is not None and all(score.logprob <= 0 for score in scored.scores[1:])
    finally:
        engine.close()


def test_mixtures_of_embeddings_are_refused_by_name(tmp_path: Path) -> None:
    exported = small_exported_blocks(tmp_path / "out", small_blocks("llama", "block"), "fp32")
    with pytest.raises(ConfigError, match="ONNX Runtime takes tokens: leave the runtime"):
        texts(exported, Residual(untrained=True), new=4)
    assert texts(exported, Residual(lam=0.0), new=4) == texts(exported, ThresholdEdit(), new=4)
    with pytest.raises(ModelError, match="takes tokens"):
        _ = exported.input_table
