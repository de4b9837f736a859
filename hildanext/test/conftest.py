"""Tiny random models that need no download, and the real data where it is at hand."""

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hildanext.models import Card, DiffusionModel
from hildanext.models.attention.dense import install_seam
from hildanext.models.card import alignment_fields

torch.set_num_threads(int(os.environ.get("HILDA_TEST_THREADS", "1")))

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def random_model(
    family: str = "qwen3",
    alignment: str = "block",
    block_size: int = 4,
    vocab: int = 61,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    layers: int = 3,
) -> DiffusionModel:
    """A small random model: ids 0..vocab-1 are real, `vocab` is the mask, rows are padded to 64."""
    config_class, model_class = FAMILIES[family]
    config = config_class(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.35,
        attn_implementation=install_seam(),
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    causal_lm = model_class(config).to(dtype).eval()
    torch.random.set_rng_state(state)
    card = Card(mask_id=vocab, vocab_rows=64, vocab_real=vocab, block_size=block_size, **alignment_fields(alignment))
    return DiffusionModel(causal_lm, card).eval()


@pytest.fixture
def make_model() -> Callable[..., DiffusionModel]:
    return random_model


@pytest.fixture
def real_data() -> Path:
    """The folder of real data sets; a test that needs it skips where it is absent."""
    folder = Path(os.environ.get("HILDA_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set HILDA_DATA)")
    return folder


@pytest.fixture(autouse=True)
def the_log_as_it_was():
    """A verb configures the log of its program; the next test is another program."""
    loggers = [logging.getLogger(name) for name in ("hildanext", "hildanext.access")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, was in zip(loggers, before, strict=True):
        logger.handlers[:], logger.level, logger.propagate = was


@pytest.fixture
def hears_ctrl_c():
    """Whatever started the tests: a program in the background of a shell begins deaf to SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
