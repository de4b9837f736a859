"""What a rule of filling costs beside the threshold's, as a share of a step: on the same canvases and logits, in turns.

One prompt is decoded one token a step. After every forward each rule, with a memory of its own, says what it would
fill; the threshold's choice is what is written. So all rules see the same shapes, and a share is taken step by step.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field

from hildanext.bench.decode_speed import finish
from hildanext.core.config import config
from hildanext.decoding import Decoder, make_decoder
from hildanext.decoding.base import Canvas, Edit
from hildanext.decoding.state import DecodeState
from hildanext.eval.generation import ONE_PER_STEP
from hildanext.models import DiffusionModel

THRESHOLD = "threshold"


def default_rules() -> dict[str, dict[str, Any]]:
    """Name to decoder section; the first is what the others are set beside."""
    rules = ("factor", "entropy_bound", "klass", "credit", "hierarchical")
    left, entropy = ({**ONE_PER_STEP, "fallback": one} for one in ("left", "entropy"))
    return {
        THRESHOLD: dict(ONE_PER_STEP),
        "threshold, left": left,
        "threshold, entropy": entropy,
        **{rule: {**ONE_PER_STEP, "reveal": {"name": rule}} for rule in rules},
    }


@config
class OverheadConfig:
    """How long it is measured."""

    steps: int = Field(default=96, ge=0)
    """Tokens that are written; 0 measures nothing."""
    turns: int = Field(default=5, ge=1)
    """Calls of each rule after a forward, of which the fastest counts."""
    rules: dict[str, dict[str, Any]] = Field(default_factory=default_rules)


@torch.inference_mode()
def measure_overhead(model: DiffusionModel, prompt: Sequence[int], settings: OverheadConfig) -> dict[str, Any]:
    """Milliseconds of the forward and of each rule's step (medians), and the median over steps of
    (rule - threshold) / (forward + threshold)."""
    decoders = {name: make_decoder(section) for name, section in settings.rules.items()}
    first = next(iter(decoders))
    seconds: dict[str, list[float]] = {name: [] for name in ("forward", *decoders)}
    state = DecodeState(model, [list(prompt)], [len(prompt) + settings.steps], lambda row, tokens: False)
    state.prefill()
    memories: dict[str, tuple[Any, ...]] = {}
    start = -1
    number = 0
    while (canvas := state.canvas()) is not None:
        if state.rows[0].start != start:  # a block begins: nobody remembers anything
            start, memories = state.rows[0].start, {}
        finish(model.device)
        begun = _now(model.device)
        where = canvas.read(decoders[first].needs(canvas))
        logits = state.logits(where)
        finish(model.device)
        seconds["forward"].append(_now(model.device) - begun)
        edits = _timed(decoders, memories, logits, where, canvas, settings.turns, number, seconds)
        memories = {name: edit.memory for name, edit in edits.items()}
        state.write(replace(edits[first], memory=()))
        number += 1
    return _shares(first, seconds)


def _timed(
    decoders: Mapping[str, Decoder],
    memories: Mapping[str, tuple[Any, ...]],
    logits: torch.Tensor,
    where: torch.Tensor,
    canvas: Canvas,
    turns: int,
    number: int,
    seconds: dict[str, list[float]],
) -> dict[str, Edit]:
    """Each rule's edit; its fastest of `turns` calls is added to `seconds`. Whoever begins is another in every step."""
    names = list(decoders)
    names = names[number % len(names) :] + names[: number % len(names)]
    fastest, edits = dict.fromkeys(names, float("inf")), {}
    for _ in range(turns):
        for name in names:
            own = replace(canvas, memory=memories.get(name, ()))
            took, edits[name] = _took(lambda name=name, own=own: decoders[name].edit(logits, where, own), logits.device)  # type: ignore[misc]
            fastest[name] = min(fastest[name], took)
    for name, took in fastest.items():
        seconds[name].append(took)
    return edits


def _took(call: Callable[[], Edit], device: torch.device) -> tuple[float, Edit]:
    begun = _now(device)
    edit = call()
    finish(device)
    return _now(device) - begun, edit


def _now(device: torch.device) -> float:
    """Seconds: on a CPU those of the processor, which do not run while somebody else has it."""
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def _shares(first: str, seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    steps = list(zip(seconds["forward"], seconds[first], strict=True))
    return {
        "steps": len(steps),
        "forward_ms": 1000 * statistics.median(seconds["forward"]),
        "rules": {
            name: {
                "ms": 1000 * statistics.median(took),
                "share": statistics.median(
                    (one - base) / (forward + base) for one, (forward, base) in zip(took, steps, strict=True)
                ),
            }
            for name, took in seconds.items()
            if name != "forward"
        },
    }
