"""A small tokenizer made on the spot, and small corpora on disk, for the tests of the data path."""

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<|bos|>", "<|endoftext|>"
WORDS = (
    "once upon a time there was a little dog who liked to run and play in the big green park with his friend".split()
)


@cache
def small_tokenizer(size: int = 300, bos: str | None = BOS) -> PreTrainedTokenizerFast:
    """Byte-level BPE over a fixed text; ids 0 and 1 are BOS and EOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = [token for token in (bos, EOS) if token is not None]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=EOS)


def story(number: int, words: int = 30) -> str:
    """Always the same text for the same number; no two numbers share one."""
    chosen = [WORDS[(number * 7 + index * (number % 5 + 1)) % len(WORDS)] for index in range(words)]
    return f"Story {number}: " + " ".join(chosen) + "."


def write_stories(path: Path, stories: list[str]) -> Path:
    path.write_text("".join(f"{story}\n<|endoftext|>\n" for story in stories), encoding="utf-8")
    return path


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """Rows as JSON lines (strings are written raw, so that broken lines can be made); gzip by the name."""
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
    return path


def dolma(number: int, text: str) -> dict[str, Any]:
    return {
        "id": f"doc-{number}",
        "text": text,
        "source": "test",
        "added": "2024-01-01T00:00:00.000Z",
        "created": "2023-01-01T00:00:00.000Z",
        "metadata": {"number": number},
    }


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative name."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
