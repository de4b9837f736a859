"""A file of prompts, answered line by line into another; killed at any instant, it goes on where it stopped.

Answers are written in the order of the prompts, a batch at a time, and batches begin at fixed places: an interrupted
run writes the same file as one that was left alone.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hildanext.core.config import read_json
from hildanext.core.errors import DataError, PromptError
from hildanext.core.metrics_log import METRICS, MetricLog, read_metrics
from hildanext.core.run_dir import write_atomically
from hildanext.data.prompts import Prompt, read_prompts

if TYPE_CHECKING:
    from hildanext.data.generation_result import GenerationResult
    from hildanext.decoding import Decoder
    from hildanext.inference import GenerationConfig
    from hildanext.models import DiffusionModel

ANSWERS = "answers.jsonl"


def answer_file(
    source: str | Path,
    folder: Path,
    model: "DiffusionModel",
    tokenizer: Any,
    decoders: Mapping[str, "Decoder"],
    settings: "GenerationConfig",
    chat: bool = False,
    special_tokens_in_text: bool = False,
) -> Path:
    """Answer every prompt of `source` by every decoder, into `answers.jsonl` in `folder`; returns its path.

    A prompt that cannot be answered (too long for the model) has `error` in place of a text. Progress goes to
    `metrics.jsonl` beside it. Raises `DataError` where the prompts are not those that the answers there belong to.
    """
    prompts = read_prompts(source)
    _remember(folder, source, list(decoders), prompts)
    encoded = [_encoded(tokenizer, prompt, chat, special_tokens_in_text) for prompt in prompts]
    path = folder / ANSWERS
    total = len(decoders) * len(prompts)
    with MetricLog(path) as answers, MetricLog(folder / METRICS) as metrics:
        done = before = len(read_metrics(path))
        began = time.monotonic()
        metrics.write(kind="progress", done=done, total=total, unit="answers")
        for number, (name, decoder) in enumerate(decoders.items()):
            for first in range(0, len(prompts), settings.batch_size):
                place = number * len(prompts) + first
                batch = range(first, min(first + settings.batch_size, len(prompts)))
                if place + len(batch) <= done:
                    continue
                records = _answer(model, tokenizer, decoder, settings, encoded, batch)
                for index, record in list(zip(batch, records, strict=True))[done - place :]:
                    answers.write(way=name, index=index, **prompts[index].as_json(), **record)
                done = place + len(batch)
                left = (time.monotonic() - began) / (done - before) * (total - done)
                metrics.write(kind="progress", done=done, total=total, unit="answers", eta_seconds=round(left, 1))
    return path


def _answer(
    model: "DiffusionModel",
    tokenizer: Any,
    decoder: "Decoder",
    settings: "GenerationConfig",
    encoded: Sequence[Sequence[int] | DataError],
    batch: Sequence[int],
) -> Iterator[dict[str, Any]]:
    """What is written of each prompt of a batch. Where one of them does not do, each is decoded alone."""
    from hildanext.inference import generate

    def complete(indices: Sequence[int]) -> "list[GenerationResult]":
        tokens: list[Sequence[int]] = []
        for index in indices:
            ids = encoded[index]
            if isinstance(ids, DataError):
                raise ids
            tokens.append(ids)
        seeds = [settings.seed + index for index in indices]
        return generate(model, tokenizer, tokens, decoder, settings, seeds=seeds)

    try:
        return iter([result.flat_record("tokens", "forwards", "edits") for result in complete(batch)])
    except (PromptError, DataError) as problem:
        if len(batch) == 1:
            return iter([{"error": str(problem)}])
    return (record for index in batch for record in _answer(model, tokenizer, decoder, settings, encoded, [index]))


def _encoded(tokenizer: Any, prompt: Prompt, chat: bool, special_tokens_in_text: bool) -> list[int] | DataError:
    """Token ids, or why a conversation has none."""
    from hildanext.data.chat_template import BadExample, Message, encode_chat
    from hildanext.tokenization import encode_prompt

    if prompt.text is not None and not chat:
        return encode_prompt(tokenizer, prompt.text)
    messages = prompt.messages if prompt.text is None else (("user", prompt.text),)
    try:
        return encode_chat(tokenizer, [Message(role, content) for role, content in messages], special_tokens_in_text)
    except BadExample as problem:
        return problem


def _remember(folder: Path, source: str | Path, decoders: list[str], prompts: Sequence[Prompt]) -> None:
    """Note which prompts the answers belong to. Raises `DataError` where they belong to others."""
    text = json.dumps([prompt.as_json() for prompt in prompts], sort_keys=True)
    record = {"prompts": len(prompts), "ways": decoders, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    path = folder / "answers.json"
    if path.is_file() and read_json(path) != record:
        raise DataError(
            f"{str(source)!r} is not what it was when {str(folder / ANSWERS)!r} was begun",
            "put the prompts back, or answer the new ones in another run",
        )
    write_atomically(path, json.dumps(record, indent=2) + "\n")
