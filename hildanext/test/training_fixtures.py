"""Small trainings: their sections, their data, a checkpoint to start from, and what is read of their metrics."""

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import hildanext
from hildanext.core.metrics_log import read_metrics
from hildanext.datasets import PrepareConfig, prepare
from hildanext.models.attention.dense import install_seam
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.card import read_card
from hildanext.models.checkpoint import save_diffusion
from hildanext.models.loading import tiny
from hildanext.tokenization import load_tokenizer
from small_models import small_parent, small_tokenizer

PHASES = [
    {"phase": "warmup", "block_size": 1, "tokens": 256},
    {"phase": "warmup", "block_size": 4, "tokens": 256},
    {"phase": "stable", "block_size": 32, "tokens": 256},
    {"phase": "decay", "block_size": 8, "tokens": 512},
]


def corpus(folder: Path, documents: int = 40, seed: int = 0) -> Path:
    numbers = np.random.default_rng(seed)
    texts = [numbers.integers(3, 60, int(numbers.integers(4, 40))).tolist() for _ in range(documents)]
    prepare(PrepareConfig(source={"name": "list"}, out=str(folder)), small_tokenizer(), documents=texts)
    return folder


def small_conversion(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sections `convert` and `data` of a conversion of a small parent, made in `folder`."""
    data = {"train": str(corpus(folder / "train")), "valid": str(corpus(folder / "valid", 6, 1))}
    data |= {"sequence_length": 32, "pad_to_block": 8}
    conversion = {
        "parent": str(small_parent(folder / "parent")),
        "alignment": "parent",
        "block_size": 8,
        "wsd": PHASES,
        "valid_rows": 4,
        "train": {
            "batch_size": 2,
            "precision": "no",
            "learning_rate": {"peak": 1e-3},
            "checkpoint_every": 3,
            "evaluate_every": 5,
        },
    }
    return conversion, data


def small_checkpoint(folder: Path) -> Path:
    """A random diffusion model with the embedded tokenizer: small enough for steps of milliseconds."""
    card = read_card(tiny.folder("diffusion"))
    config = Qwen3Config(
        vocab_size=card.vocab_rows, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, attn_implementation=install_seam(),
    )  # fmt: skip
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = DiffusionModel(Qwen3ForCausalLM(config), card)
    torch.random.set_rng_state(state)
    save_diffusion(folder, model, load_tokenizer(tiny.folder("diffusion")))
    return folder


def change(conversion: dict[str, Any], **train_fields: Any) -> dict[str, Any]:
    return {**conversion, "train": {**conversion["train"], **train_fields}}


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"]


def metric_lines(steps: int = 40) -> list[dict]:
    """Warm-up at 1 and 4, stable at 64, decay at 16, an evaluation every ten steps."""
    lines: list[dict] = []
    for step in range(1, steps + 1):
        share = step / steps
        phase, size = ("warmup", 1 if share < 0.2 else 4) if share <= 0.4 else ("stable", 64)
        if share > 0.7:
            phase, size = "decay", 16
        lines.append(
            {
                "kind": "train", "step": step, "tokens": 100 * step, "phase": phase, "block_size": size,
                "learning_rate": 1e-3, "loss": 5 - 2 * share, "losses": {"m2t": 4 - 2 * share, "t2t": 1.0},
                "accuracy_by_t": {"0.00-0.25": share, "0.25-0.50": None, "0.75-1.00": 0.1},
                "masked_accuracy": share, "tokens_per_second": 300.0, "seconds": 0.3,
            }
        )  # fmt: skip
        if step % 10 == 0:
            lines.append(
                {"kind": "eval", "step": step, "tokens": 100 * step, "block_size": 16, "bound": 4.0, "bound_se": 0.1}
            )
    return lines


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(hildanext.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def wait_for_steps(run: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= count:
            return
        time.sleep(0.005)
