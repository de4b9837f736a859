"""llama.cpp beside us, on the same weights: through the package `xllamacpp`, where it is installed.

It is asked as its own server is, in this process. Its answers come as text and are tokenised again.
"""

import hashlib
import importlib.util
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hildanext.bench.gguf_writer import write_gguf
from hildanext.core.json_text import parse

NGRAM = 2
"""Tokens that must match where it looks drafts up."""


def is_installed() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


def gguf_of(causal_lm: Any, tokenizer: Any, weights: str, folder: Path) -> Path:
    """The parent's weights as a GGUF file of that quantisation, written into `folder` once."""
    config = causal_lm.config
    head = causal_lm.get_output_embeddings().weight.detach()[:: max(config.vocab_size // 64, 1)].float().cpu().numpy()
    facts = f"{config.model_type} {config.hidden_size} {config.num_hidden_layers} {config.vocab_size}".encode()
    name = hashlib.sha256(facts + head.tobytes()).hexdigest()[:16]
    path = folder / f"{name}-{weights}.gguf"
    if not path.is_file():
        write_gguf(path, causal_lm, tokenizer, weights)
    return path


@dataclass(frozen=True)
class Said:
    """What llama.cpp wrote, and what it says it took."""

    text: str
    seconds: float
    first_seconds: float
    forwards: int
    rows: int


class LlamaCpp:
    """One model on the CPU, one request at a time. `drafts`: tokens that prompt look-up drafts; None: it is off."""

    def __init__(self, path: Path, threads: int, drafts: int | None) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel, settings.n_gpu_layers, settings.verbosity = 2048, 1, 0, -1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.cache_prompt = settings.fit_params = False
        if drafts is not None:
            settings.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
            settings.speculative.ngram_simple.size_n = NGRAM
            settings.speculative.ngram_simple.size_m = drafts
        self.server = xllamacpp.Server(settings)

    def complete(self, prompt: Sequence[int], new: int) -> Said:
        asked = {"prompt": list(prompt), "n_predict": new, "temperature": 0, "top_k": 1, "cache_prompt": False}
        began = time.perf_counter()
        answer = self.server.handle_completions(asked)
        seconds = time.perf_counter() - began
        answer = answer if isinstance(answer, dict) else parse(answer)
        times = answer["timings"]
        drafted, kept = times.get("draft_n", 0), times.get("draft_n_accepted", 0)
        forwards = times["predicted_n"] - 1 - kept
        first = times["prompt_ms"] / 1000.0
        return Said(answer["choices"][0]["text"], seconds, first, forwards, forwards + drafted)
