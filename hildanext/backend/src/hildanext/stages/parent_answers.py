"""The parent's own answers to prompts of a file, as documents of which the answer alone is learnt.

Answers are written in batches of prompts of like length, in an order that the prompts alone decide, and each batch is
noted in `answers.jsonl` as soon as it is whole: killed at any instant, the same call goes on behind the last one.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from hildanext.core.config import Seed, config, validate
from hildanext.core.errors import ConfigError, DataError
from hildanext.core.metrics_log import MetricLog, read_metrics
from hildanext.data.prompts import Prompt, read_prompts

if TYPE_CHECKING:
    from hildanext.ar import Parent
    from hildanext.datasets import Answered

ANSWERS = "answers.jsonl"
BATCHES_SORTED = 8
"""Prompts of so many batches are put in order of length: padding is small, and the first answers come early."""


@config
class ParentAnswers:
    """The source "parent" with prompts: what it is asked, and how it answers."""

    name: Literal["parent"] = "parent"
    prompts: str
    """One per line, or JSON lines (`.jsonl`): strings, or objects with `prompt` or `messages`."""
    prompt_field: str = "prompt"
    """Of JSON lines, the key that holds the text (`question` in GSM8K's files)."""
    chat: bool = False
    """A prompt of text is a question, put into the model's chat template; conversations always are."""
    special_tokens_in_text: bool = False
    """In a conversation, parse control tokens that a message spells. Usually they are text."""
    skip: int = Field(default=0, ge=0)
    """Prompts that are left out at the start of the file, ..."""
    documents: int | None = Field(default=None, ge=1)
    """... and how many are asked behind those; None: all."""
    max_tokens: int = Field(default=256, ge=1)
    """Of an answer."""
    temperature: float = Field(default=0.0, ge=0.0)
    """0 is greedy: what the parent would itself write."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    batch_size: int = Field(default=32, ge=1)
    seed: Seed = 0


@dataclass(frozen=True)
class _Asked:
    """A prompt as tokens, or why it cannot be answered."""

    number: int
    """Among the prompts that are asked, from 0."""
    line: int
    tokens: Sequence[int]
    refused: str = ""


def asks(source: Mapping[str, Any]) -> bool:
    """Whether a source "parent" answers prompts; without them it writes documents of its own. Raises `ConfigError`
    for settings that only mean something with prompts."""
    if "prompts" in source:
        return True
    strangers = [key for key in ("chat", "prompt_field", "skip", "special_tokens_in_text") if source.get(key)]
    if strangers:
        raise ConfigError(f"source parent: {strangers[0]} without prompts", "give a file of prompts: --prompts FILE")
    return False


def read_asked(source: Mapping[str, Any]) -> tuple[ParentAnswers, list[Prompt]]:
    """The knobs, and the prompts that they choose. Raises `ConfigError` for unknown knobs, `DataError` for a file
    without prompts, or with too few of them."""
    settings = validate(ParentAnswers, source, "source parent")
    return settings, _prompts(settings)


def identified(settings: ParentAnswers, prompts: Sequence[Prompt], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a folder of answers says of itself: how many prompts and which, not where their file lay."""
    text = json.dumps([prompt.said() for prompt in prompts], sort_keys=True)
    sampled = {"temperature": settings.temperature, "top_p": settings.top_p, "seed": settings.seed}
    how = {"greedy": True} if settings.temperature == 0 else sampled
    return {
        "name": "parent", "prompts": len(prompts), "prompts_hash": hashlib.sha256(text.encode()).hexdigest(),
        "chat": settings.chat, "special_tokens_in_text": settings.special_tokens_in_text,
        "max_tokens": settings.max_tokens, **how, "batch_size": settings.batch_size, **facts,
    }  # fmt: skip


def answers(
    settings: ParentAnswers, prompts: Sequence[Prompt], parent: "Parent", folder: Path, skip: int = 0
) -> "Iterator[Answered]":
    """Every prompt with its answer; those that cannot be answered come first. `skip` of all are left out.

    Raises `DataError` where `answers.jsonl` in `folder` belongs to other prompts.
    """
    from hildanext.datasets import Answered

    asked = [_encoded(settings, parent, number, prompt) for number, prompt in enumerate(prompts)]
    refused = [one for one in asked if one.refused]
    for one in refused[skip:]:
        yield Answered((), 0, f"prompt in line {one.line}", one.refused)
    left, batches = max(skip - len(refused), 0), _batches(settings, [one for one in asked if not one.refused])
    with MetricLog(folder / ANSWERS) as log:
        known = _known(folder / ANSWERS, [one for batch in batches for one in batch])
        at = 0
        for batch in batches:
            written = known[at : at + len(batch)]
            there = len(written)
            if there < len(batch):
                written += _answer(settings, parent, batch)[there:]
                for one, (tokens, reason, text) in list(zip(batch, written, strict=True))[there:]:
                    log.write(line=one.line, prompt=list(one.tokens), answer=tokens, finish_reason=reason, text=text)
            for one, (tokens, *_) in list(zip(batch, written, strict=True))[max(left - at, 0) :]:
                yield Answered((*one.tokens, *tokens), len(one.tokens), f"prompt in line {one.line}")
            at += len(batch)


def _prompts(settings: ParentAnswers) -> list[Prompt]:
    prompts = read_prompts(settings.prompts, settings.prompt_field)
    last = None if settings.documents is None else settings.skip + settings.documents
    if len(prompts) <= settings.skip or (last is not None and len(prompts) < last):
        wanted = f"{settings.documents} behind the first {settings.skip}" if last is not None else f"> {settings.skip}"
        raise DataError(
            f"{settings.prompts!r} holds {len(prompts)} prompts, and {wanted} are wanted",
            "lower skip or documents, or give a longer file",
        )
    return prompts[settings.skip : last]


def _encoded(settings: ParentAnswers, parent: "Parent", number: int, prompt: Prompt) -> _Asked:
    from hildanext.data.chat_template import BadExample, Message, encode_chat
    from hildanext.inference import checked_prompt
    from hildanext.tokenization import encode_prompt

    turns, tokenizer = prompt.messages, parent.tokenizer
    if prompt.text is not None and settings.chat:
        turns = (("user", prompt.text),)
    try:
        if turns:
            messages = [Message(role, content) for role, content in turns]
            ids = encode_chat(tokenizer, messages, settings.special_tokens_in_text)
        else:
            ids = encode_prompt(tokenizer, str(prompt.text))
    except BadExample as problem:
        return _Asked(number, prompt.line, (), problem.kind)
    ids = checked_prompt(parent, tokenizer, ids)
    context = int(parent.causal_lm.config.max_position_embeddings)
    fits = len(ids) + settings.max_tokens <= context
    refused = "" if fits else f"prompt and {settings.max_tokens} new tokens exceed the context"
    return _Asked(number, prompt.line, ids, refused)


def _batches(settings: ParentAnswers, asked: Sequence[_Asked]) -> list[list[_Asked]]:
    size = settings.batch_size
    batches = []
    for first in range(0, len(asked), size * BATCHES_SORTED):
        near = sorted(asked[first : first + size * BATCHES_SORTED], key=lambda one: len(one.tokens))
        batches += [near[at : at + size] for at in range(0, len(near), size)]
    return batches


Written = tuple[list[int], str, str]
"""Tokens, why they end, their text."""


def _answer(settings: ParentAnswers, parent: "Parent", batch: Sequence[_Asked]) -> list[Written]:
    from hildanext.inference import eos_ids

    results = parent.generate_batch(
        [one.tokens for one in batch],
        settings.max_tokens,
        settings.temperature,
        settings.top_p if settings.top_p < 1.0 else None,
        seeds=[settings.seed + one.number for one in batch],
        stop_ids=sorted(eos_ids(parent, parent.tokenizer)),
    )
    return [(list(result.tokens), result.finish_reason, result.text) for result in results]


def _known(path: Path, asked: Sequence[_Asked]) -> list[Written]:
    """What an earlier call has answered. Raises `DataError` where it was asked something else."""
    lines = read_metrics(path)
    same = len(lines) <= len(asked) and all(
        line["prompt"] == list(one.tokens) for line, one in zip(lines, asked, strict=False)
    )
    if not same:
        raise DataError(f"{str(path)!r} holds answers to other prompts", "give another output folder, or delete it")
    return [(line["answer"], line["finish_reason"], line["text"]) for line in lines]
