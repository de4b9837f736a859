"""What the engine costs and gains: the same requests through the engine, the bare loop, the bare network, the parent.

Every forward of the engine and of the loop is followed at once by the same work of the network alone: as many tokens
through the backbone that see as many keys, and as many logits, with no cache bookkeeping, thresholds, texts or
threads. That is what the batched forward allows; a busy machine slows both alike. The time of these forwards is taken
off what is reported of the engine and of the loop.
"""

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from rich.table import Table

from hildanext.ar import Parent
from hildanext.bench.decode_speed import BareForward, finish
from hildanext.core.config import Seed, config, plain
from hildanext.core.progress import Repeats
from hildanext.core.runtime import machine
from hildanext.decoding import MODES, make_decoder
from hildanext.engine.base import EngineEvent, Failed, Finished, Request, RequestOutput
from hildanext.engine.local import LocalEngine, LocalEngineConfig
from hildanext.inference import GenerationConfig, generate
from hildanext.kv_cache import CachedAttention, Segment
from hildanext.models import DiffusionModel


@config
class EngineSpeedConfig:
    """The load. Prompts are random tokens: what is measured is time."""

    prompt_tokens: int = Field(default=200, ge=1)
    new_tokens: int = Field(default=64, ge=1)
    concurrency: int = Field(default=8, ge=1)
    repeats: int = Field(default=3, ge=1)
    seed: Seed = 0
    decoder: dict[str, Any] = Field(default_factory=lambda: dict(MODES["S_MODE"]))

    def __post_init__(self) -> None:
        make_decoder(self.decoder)


@dataclass
class Pair:
    """A forward, and what the network alone takes for the same."""

    segments: tuple[Segment, ...]
    network: float
    pause: float
    """Seconds that measuring has held up the one whose forward this is."""


@contextmanager
def beside(model: DiffusionModel) -> Iterator[list[Pair]]:
    """Follow every forward of `model` inside the context by the same work of the network alone."""
    pairs: list[Pair] = []
    bare, busy = BareForward(model), False

    def follow(work: Callable[[], float]) -> tuple[float, float]:
        nonlocal busy
        finish(model.device)
        begun, busy = time.perf_counter(), True
        seconds = work()
        busy = False
        return seconds, time.perf_counter() - begun

    def on_forward(_: Any, arguments: tuple[Any, ...], __: Any) -> None:
        if busy:
            return
        attention = arguments[2]
        assert isinstance(attention, CachedAttention)
        segments = tuple(attention.segments)
        fed = sum(segment.num_tokens for segment in segments)
        extent = round(sum(segment.num_tokens * segment.end for segment in segments) / fed)
        pairs.append(Pair(segments, *follow(lambda: bare.backbone(fed, extent)[0])))

    def on_head(_: Any, arguments: tuple[Any, ...], __: Any) -> None:
        if busy or not pairs:
            return
        seconds, pause = follow(lambda: bare.head(arguments[0]))
        pairs[-1].network += seconds
        pairs[-1].pause += pause

    handles = [
        model.register_forward_hook(on_forward),
        model.causal_lm.get_output_embeddings().register_forward_hook(on_head),
    ]
    try:
        yield pairs
    finally:
        for handle in handles:
            handle.remove()


def _sums(pairs: Sequence[Pair]) -> tuple[float, float]:
    """Seconds of the network alone, and of the pauses."""
    return sum(pair.network for pair in pairs), sum(pair.pause for pair in pairs)


def together(engine: LocalEngine, requests: Sequence[Request]) -> tuple[list[RequestOutput], float]:
    """All requests at once; their answers and the seconds until the last."""
    answers: dict[int, RequestOutput] = {}
    failures: list[Failed] = []
    whole = threading.Semaphore(0)

    def sink(number: int) -> Callable[[EngineEvent], None]:
        def hear(event: EngineEvent) -> None:
            if isinstance(event, Finished):
                answers[number] = event.answer
            elif isinstance(event, Failed):
                failures.append(event)
            if isinstance(event, Finished | Failed):
                whole.release()

        return hear

    begun = time.perf_counter()
    for number, request in enumerate(requests):
        engine.submit(request, sink(number))
    for _ in requests:
        whole.acquire()
    if failures:
        raise failures[0].error
    return [answers[number] for number in range(len(requests))], time.perf_counter() - begun


def measure(
    model: DiffusionModel,
    tokenizer: Any,
    parent: Parent | None,
    settings: EngineSpeedConfig,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Every repeat: bare loop, engine alone, engine full, each beside the network alone; the parent both ways."""
    engine = LocalEngine(
        model, tokenizer, None, LocalEngineConfig(slots=settings.concurrency, keep_prefixes=False), "bench"
    )
    draw = torch.Generator().manual_seed(settings.seed)
    repeats = []
    try:
        _repeat(engine, parent, settings, draw)  # nobody's first forward is timed
        progress = Repeats(settings.repeats, say)
        for number in range(1, settings.repeats + 1):
            repeats.append(_repeat(engine, parent, settings, draw))
            progress.done(number)
    finally:
        engine.close()
    medians = {
        key: statistics.median(values)
        for key in repeats[0]
        if (values := [repeat[key] for repeat in repeats if repeat[key] is not None])
    }
    return {
        "bench": "engine",
        "card": plain(model.card),
        "settings": plain(settings),
        "machine": machine(model.device, model.dtype),
        "medians": medians,
        "repeats": repeats,
    }


def _repeat(
    engine: LocalEngine, parent: Parent | None, settings: EngineSpeedConfig, draw: torch.Generator
) -> dict[str, Any]:
    model = engine.model
    assert model is not None
    prompts = torch.randint(model.card.vocab_real - 1, (settings.concurrency, settings.prompt_tokens), generator=draw)
    requests = [
        Request(tokens=tuple(row), decoder=settings.decoder, max_new_tokens=settings.new_tokens, ignore_eos=True)
        for row in prompts.tolist()
    ]
    loop = _loop(engine, requests[0], settings)
    with beside(model) as pairs:
        (single,), alone = together(engine, requests[:1])
    network, pause = _sums(pairs)
    alone -= pause
    first_network, first_pause = _sums([pair for pair in pairs if not _first_block_done(pair, settings, model)])
    first = single.first_piece_seconds - first_pause
    with beside(model) as pairs:
        answers, full = together(engine, requests)
    full_network, pause = _sums(pairs)
    full -= pause
    tokens = sum(len(answer.tokens) for answer in answers)
    ours = len(single.tokens) / alone
    with_parent = _parent(parent, prompts.tolist(), settings) if parent is not None else (None, None)
    return {
        "alone_tokens_per_second": ours,
        "alone_over_network": alone / network,
        "loop_over_network": loop,
        "alone_over_loop": alone / network / loop,
        "first_block_seconds": first,
        "first_block_over_network": first / first_network,
        "together_tokens_per_second": tokens / full,
        "together_network_tokens_per_second": tokens / full_network,
        "together_share_of_network": full_network / full,
        "together_over_alone": tokens / full / ours,
        "forwards": len(pairs),
        "tokens_per_forward": tokens / sum(answer.stats.denoise_forwards for answer in answers),
        "parent_alone_tokens_per_second": with_parent[0],
        "parent_together_tokens_per_second": with_parent[1],
    }


def _first_block_done(pair: Pair, settings: EngineSpeedConfig, model: DiffusionModel) -> bool:
    block = model.card.block_size
    return any(
        segment.noisy and segment.start + segment.clean >= settings.prompt_tokens // block * block + block
        for segment in pair.segments
    )


def _loop(engine: LocalEngine, request: Request, settings: EngineSpeedConfig) -> float:
    """Seconds of the decode loop without an engine, texts included, over those of the network alone."""
    how = GenerationConfig(max_new_tokens=settings.new_tokens, ignore_eos=True)
    prompt = request.tokens if request.tokens is not None else ()
    model = engine.model
    assert model is not None
    with beside(model) as pairs:
        begun = time.perf_counter()
        generate(model, engine.tokenizer, [prompt], make_decoder(dict(settings.decoder)), how)
        finish(model.device)
        seconds = time.perf_counter() - begun
    network, pause = _sums(pairs)
    return (seconds - pause) / network


def _parent(parent: Parent, prompts: list[list[int]], settings: EngineSpeedConfig) -> tuple[float, float]:
    """The parent's tokens per second, one prompt alone and all as one batch; greedy, no end of text."""
    alone = parent.generate(prompts[0], settings.new_tokens, stop_ids=[])
    begun = time.perf_counter()
    parent.generate_batch(prompts, settings.new_tokens, stop_ids=[])
    return alone.stats.tokens_per_second, settings.new_tokens * len(prompts) / (time.perf_counter() - begun)


def tables(result: dict[str, Any]) -> list[Table]:
    """Tokens per second and ratios, medians over the repeats."""
    medians, many = result["medians"], result["settings"]["concurrency"]
    speed = Table(title="Tokens per second", title_justify="left")
    for column in ("", "one alone", f"{many} together"):
        speed.add_column(column, justify="left" if not column else "right", no_wrap=True)
    speed.add_row("engine", *(f"{medians[f'{key}_tokens_per_second']:.1f}" for key in ("alone", "together")))
    speed.add_row("the network alone", "", f"{medians['together_network_tokens_per_second']:.1f}")
    if "parent_alone_tokens_per_second" in medians:
        runs = ("parent_alone", "parent_together")
        speed.add_row("AR parent", *(f"{medians[f'{key}_tokens_per_second']:.1f}" for key in runs))
    ratios = Table(title="Ratios", title_justify="left")
    ratios.add_column("", no_wrap=True)
    ratios.add_column("median", justify="right")
    rows = {
        "together_share_of_network": f"{many} together: share of what the network alone allows",
        "together_over_alone": f"{many} together over one alone",
        "alone_over_loop": "one alone: seconds over the bare decode loop's",
        "first_block_over_network": "first block alone: seconds over its forwards' by the network alone",
        "tokens_per_forward": "tokens per forward of a request",
    }
    for key, words in rows.items():
        ratios.add_row(words, f"{medians[key]:.2f}")
    return [speed, ratios]
