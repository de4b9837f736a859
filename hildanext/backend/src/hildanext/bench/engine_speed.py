"""What the engine costs and gains: the same requests through the engine, the bare loop, the bare network, the parent.

Every forward of the engine is noted (which runs of tokens, how many logits) and then computed again by the network
alone: one dense forward of the rows' blocks and one of the clean tokens, with no cache bookkeeping, thresholds, texts
or threads. That is what the batched block forward allows. All in one process, one after the other, repeat by repeat;
ratios are taken within a repeat.
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
from hildanext.config import knobs, plain
from hildanext.decode import MODES, make_decoder
from hildanext.engines.base import Answer, EngineEvent, Failed, Finished, Request
from hildanext.engines.transformers import TransformersEngine, TransformersKnobs
from hildanext.inference import GenerationKnobs, generate
from hildanext.kv import CachedAttention, Run
from hildanext.models import DiffusionModel
from hildanext.runtime import machine


@knobs
class EngineSpeedKnobs:
    """The load. Prompts are random tokens: what is measured is time."""

    prompt_tokens: int = Field(default=200, ge=1)
    new_tokens: int = Field(default=64, ge=1)
    concurrency: int = Field(default=8, ge=1)
    repeats: int = Field(default=3, ge=1)
    seed: int = 0
    decoder: dict[str, Any] = Field(default_factory=lambda: dict(MODES["S_MODE"]))


@dataclass(frozen=True)
class Shape:
    """One forward of the engine: its runs, and the logits that were read."""

    runs: tuple[Run, ...]
    read: int
    ended: float
    """When, on the clock of `time.perf_counter`."""


@contextmanager
def noted(model: DiffusionModel) -> Iterator[list[Shape]]:
    """Collect the shape of every forward of `model` inside the context."""
    shapes: list[Shape] = []

    def on_forward(_: Any, arguments: tuple[Any, ...], __: Any) -> None:
        attention = arguments[2]
        assert isinstance(attention, CachedAttention)
        shapes.append(Shape(tuple(attention.runs), 0, time.perf_counter()))

    def on_head(_: Any, arguments: tuple[Any, ...], __: Any) -> None:
        if shapes:
            shapes[-1] = Shape(shapes[-1].runs, len(arguments[0]), time.perf_counter())

    handles = [
        model.register_forward_hook(on_forward),
        model.causal_lm.get_output_embeddings().register_forward_hook(on_head),
    ]
    try:
        yield shapes
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def network_seconds(model: DiffusionModel, shapes: Sequence[Shape]) -> float:
    """Seconds that the network alone takes for the same forwards."""
    bare = BareForward(model)
    total = 0.0
    for shape in shapes:
        noisy = [run for run in shape.runs if run.noisy]
        clean = sum(run.clean for run in shape.runs)
        if noisy:
            extent = max(run.extent for run in noisy)
            total += bare.seconds(noisy[0].noisy, extent, shape.read, rows=len(noisy))[1]
        if clean:
            extent = max(run.start + run.clean for run in shape.runs if run.clean)
            total += bare.seconds(clean, max(extent, clean), 0)[0]
    return total


def together(engine: TransformersEngine, requests: Sequence[Request]) -> tuple[list[Answer], float]:
    """All requests at once; their answers and the seconds until the last."""
    answers: dict[int, Answer] = {}
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
    settings: EngineSpeedKnobs,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Every repeat: bare loop, engine alone, network alone; engine full, network alone; the parent both ways."""
    engine = TransformersEngine(
        model, tokenizer, None, TransformersKnobs(slots=settings.concurrency, keep_prefixes=False), "bench"
    )
    draw = torch.Generator().manual_seed(settings.seed)
    repeats = []
    try:
        _repeat(engine, parent, settings, draw)  # nobody's first forward is timed
        for number in range(settings.repeats):
            repeats.append(_repeat(engine, parent, settings, draw))
            if say is not None:
                say(f"repeat {number + 1} of {settings.repeats}")
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
    engine: TransformersEngine, parent: Parent | None, settings: EngineSpeedKnobs, draw: torch.Generator
) -> dict[str, Any]:
    model = engine.model
    prompts = torch.randint(model.card.vocab_real - 1, (settings.concurrency, settings.prompt_tokens), generator=draw)
    requests = [
        Request(tokens=tuple(row), decoder=settings.decoder, max_new_tokens=settings.new_tokens, ignore_eos=True)
        for row in prompts.tolist()
    ]
    loop = _loop(engine, requests[0], settings)
    with noted(model) as shapes:
        (single,), alone = together(engine, requests[:1])
    first = [shape for shape in shapes if not _first_block_done(shape, settings, model)]
    bare_alone, bare_first = network_seconds(model, shapes), network_seconds(model, first)
    with noted(model) as shapes:
        answers, full = together(engine, requests)
    bare_full = network_seconds(model, shapes)
    tokens = sum(len(answer.tokens) for answer in answers)
    ours = len(single.tokens) / alone
    beside = _parent(parent, prompts.tolist(), settings) if parent is not None else (None, None)
    return {
        "alone_tokens_per_second": ours,
        "alone_over_loop": alone / loop,
        "alone_over_network": alone / bare_alone,
        "first_block_seconds": single.first_piece_seconds,
        "first_block_over_network": single.first_piece_seconds / bare_first,
        "together_tokens_per_second": tokens / full,
        "together_network_tokens_per_second": tokens / bare_full,
        "together_share_of_network": bare_full / full,
        "together_over_alone": tokens / full / ours,
        "forwards": len(shapes),
        "tokens_per_forward": tokens / sum(answer.stats.denoise_forwards for answer in answers),
        "parent_alone_tokens_per_second": beside[0],
        "parent_together_tokens_per_second": beside[1],
    }


def _first_block_done(shape: Shape, settings: EngineSpeedKnobs, model: DiffusionModel) -> bool:
    block = model.card.block_size
    return any(
        run.noisy and run.start + run.clean >= settings.prompt_tokens // block * block + block for run in shape.runs
    )


def _loop(engine: TransformersEngine, request: Request, settings: EngineSpeedKnobs) -> float:
    """Seconds of the decode loop without an engine, texts included."""
    how = GenerationKnobs(max_new_tokens=settings.new_tokens, ignore_eos=True)
    begun = time.perf_counter()
    prompt = request.tokens if request.tokens is not None else ()
    generate(engine.model, engine.tokenizer, [prompt], make_decoder(dict(settings.decoder)), how)
    finish(engine.model.device)
    return time.perf_counter() - begun


def _parent(parent: Parent, prompts: list[list[int]], settings: EngineSpeedKnobs) -> tuple[float, float]:
    """The parent's tokens per second, one prompt alone and all as one batch; greedy, no end of text."""
    alone = parent.generate(prompts[0], settings.new_tokens, stop_ids=[])
    begun = time.perf_counter()
    parent.generate_batch(prompts, settings.new_tokens, stop_ids=[])
    return alone.tokens_per_second, settings.new_tokens * len(prompts) / (time.perf_counter() - begun)


def tables(result: dict[str, Any]) -> list[Table]:
    """Tokens per second and ratios, medians over the repeats."""
    found, many = result["medians"], result["settings"]["concurrency"]
    speed = Table(title="Tokens per second", title_justify="left")
    for column in ("", "one alone", f"{many} together"):
        speed.add_column(column, justify="left" if not column else "right", no_wrap=True)
    speed.add_row("engine", *(f"{found[f'{key}_tokens_per_second']:.1f}" for key in ("alone", "together")))
    speed.add_row("the network alone", "", f"{found['together_network_tokens_per_second']:.1f}")
    if "parent_alone_tokens_per_second" in found:
        ways = ("parent_alone", "parent_together")
        speed.add_row("AR parent", *(f"{found[f'{key}_tokens_per_second']:.1f}" for key in ways))
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
        ratios.add_row(words, f"{found[key]:.2f}")
    return [speed, ratios]
