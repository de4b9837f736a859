"""How much time decoding adds to the network: a step of the decode loop beside the bare forward of the same shape.

The bare forward feeds the same number of tokens through the same backbone over as many cached keys, then the head
at as many positions, and does nothing else: no cache bookkeeping, no thresholds, no edits. It runs after every step of
the loop, so that a busy machine slows both alike, and ratios are taken pair by pair.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hildanext.ar import Parent
from hildanext.core.config import Seed, config, plain
from hildanext.core.errors import ConfigError
from hildanext.core.progress import Repeats
from hildanext.core.runtime import machine
from hildanext.decoding import DIFFUSION_MODES, MODES, make_decoder
from hildanext.decoding.base import step
from hildanext.decoding.state import DecodeState
from hildanext.eval.generation import GenerationBenchConfig, compare, label
from hildanext.inference import check_prunable
from hildanext.kv_cache.prune import make_prune
from hildanext.models import DiffusionModel


@config
class DecodeSpeedConfig:
    """The shape of the measurement. Prompts are random tokens: what is measured is time."""

    prompt_tokens: int = Field(default=64, ge=1)
    new_tokens: int = Field(default=64, ge=1)
    repeats: int = Field(default=3, ge=1)
    seed: Seed = 0
    decoders: dict[str, dict[str, Any]] = Field(
        default_factory=lambda: {name: dict(MODES[name]) for name in DIFFUSION_MODES}
    )

    cache: dict[str, Any] | str | None = None
    """What the loop keeps of its keys and values (FULL), as `inference.GenerationConfig.cache`; the bare forward has
    all."""

    def __post_init__(self) -> None:
        make_prune(self.cache)
        if all(make_decoder(section).searches for section in self.decoders.values()):
            raise ConfigError(
                f"a search has no step of one row to set beside the bare forward, and decoders are {[*self.decoders]}",
                "name another one beside it",
            )


@dataclass
class Pairs:
    """Steps of one kind: seconds of the loop's step, of backbone and head, and of the backbone, step by step."""

    loop: list[float] = field(default_factory=list)
    network: list[float] = field(default_factory=list)
    backbone: list[float] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """Medians in milliseconds, and medians of the paired ratios."""
        ratios = {
            f"over_{name}": statistics.median(a / b for a, b in zip(self.loop, other, strict=True))
            for name, other in (("network", self.network), ("backbone", self.backbone))
        }
        times = {"loop": self.loop, "network": self.network, "backbone": self.backbone}
        return {
            "steps": len(self.loop),
            **{f"{name}_ms": 1000 * statistics.median(seconds) for name, seconds in times.items()},
            **ratios,
        }


@dataclass
class _BareAttention:
    """Keys and values of the same sizes, written and read with no bookkeeping; everything is visible."""

    keys: Tensor
    values: Tensor
    """[layers rows kv_heads slots head_dim]"""
    extent: int
    """Slots that each token sees."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        batch, heads, fed, head_dim = query.shape
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, -fed:], values[:, :, -fed:] = key, value
        keys, values = keys[:, :, : self.extent], values[:, :, : self.extent]
        kv_heads = key.shape[1]
        folded = query.reshape(batch, kv_heads, heads // kv_heads * fed, head_dim)
        return scaled_dot_product_attention(folded, keys, values, scale=scale).reshape(batch, heads, fed, head_dim)


class BareForward:
    """The network alone, for any shape."""

    def __init__(self, model: DiffusionModel) -> None:
        self.model = model
        config = model.causal_lm.config
        heads = config.num_attention_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.layers, self.kv_heads = config.num_hidden_layers, config.num_key_value_heads

    def backbone(self, fed: int, extent: int) -> tuple[float, Float[Tensor, "fed hidden"]]:
        """Seconds of a forward of `fed` tokens that see `extent` slots each, and its hidden states."""
        model = self.model
        slots = max(fed, extent)
        shape = (self.layers, 1, self.kv_heads, slots, self.head_dim)
        cache = torch.zeros(2, *shape, dtype=model.dtype, device=model.device)
        tokens = torch.zeros(1, fed, dtype=torch.long, device=model.device)
        positions = torch.arange(slots - fed, slots, device=model.device)[None]
        attention = _BareAttention(cache[0], cache[1], extent)
        begun = time.perf_counter()
        hidden = model.hidden(tokens, positions, attention)
        finish(model.device)
        return time.perf_counter() - begun, hidden[0]

    def head(self, hidden: Float[Tensor, "read hidden"]) -> float:
        """Seconds of the logits of these states."""
        begun = time.perf_counter()
        self.model.logits(hidden)
        finish(self.model.device)
        return time.perf_counter() - begun


def finish(device: torch.device) -> None:
    """Wait for the device's queue, so that a clock reads work and not its submission."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def loop_against_bare(
    model: DiffusionModel,
    section: dict[str, Any],
    settings: DecodeSpeedConfig,
    prompt: Sequence[int],
    into: dict[str, Pairs],
) -> None:
    """Decode `prompt`, following each step by its bare forward; adds to `into`, by kind of step."""
    decoder = make_decoder(dict(section))
    decoder.check_model(model)
    bare = BareForward(model)
    prune = make_prune(settings.cache)
    check_prunable(prune, model, decoder)
    limits = [len(prompt) + settings.new_tokens]
    session = DecodeState(model, [prompt], limits, lambda row, tokens: False, prune=prune, window=decoder.window)
    session.prefill()
    while True:
        finish(model.device)
        begun = time.perf_counter()
        canvas = session.canvas()
        if canvas is None:
            return
        start, cached = session.rows[0].start, session.rows[0].cached
        step(decoder, session, canvas)
        finish(model.device)
        loop = time.perf_counter() - begun
        fed = start - cached + session.noisy
        if fed == 0:
            continue
        pair = into["step + commit" if start > cached else "step"]
        backbone, hidden = bare.backbone(fed, start + session.noisy)
        pair.loop.append(loop)
        pair.backbone.append(backbone)
        pair.network.append(backbone + bare.head(hidden[: int(decoder.needs(canvas).sum())]))


def measure(
    model: DiffusionModel,
    parent: Parent | None,
    settings: DecodeSpeedConfig,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Step times against bare forwards for each decoder, then whole generations beside the parent's."""
    generator = torch.Generator().manual_seed(settings.seed)
    prompts = [
        torch.randint(model.card.vocab_real - 1, (settings.prompt_tokens,), generator=generator).tolist()
        for _ in range(settings.repeats)
    ]
    stepping = {name: part for name, part in settings.decoders.items() if not make_decoder(part).searches}
    steps: dict[str, dict[str, Pairs]] = {name: defaultdict(Pairs) for name in stepping}
    throwaway: dict[str, Pairs] = defaultdict(Pairs)
    loop_against_bare(model, next(iter(stepping.values())), settings, prompts[0], throwaway)
    repeats = Repeats(settings.repeats, say)
    for number, prompt in enumerate(prompts, 1):
        for name, section in stepping.items():
            loop_against_bare(model, section, settings, prompt, steps[name])
        repeats.done(number)
    whole = GenerationBenchConfig(
        prompts=len(prompts),
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        seed=settings.seed,
        decoders=settings.decoders,
    )
    written = compare(model, None, parent, prompts, whole)
    return {
        "bench": "decode",
        "card": plain(model.card),
        "settings": plain(settings),
        "machine": machine(model.device, model.dtype),
        "steps": {name: {kind: pair.plain() for kind, pair in kinds.items()} for name, kinds in steps.items()},
        "generation": [method.to_record() for method in written],
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """Milliseconds per step, then whole generations."""
    title = "One step of decoding, medians in ms (the last two columns: medians of paired ratios)"
    steps = Table(title=title, title_justify="left")
    for column in ("decoder", "kind", "steps", "loop", "bare + head", "bare", "loop / (bare + head)", "loop / bare"):
        steps.add_column(column, justify="left" if column in ("decoder", "kind") else "right", no_wrap=True)
    for name, kinds in result["steps"].items():
        for kind, medians in kinds.items():
            times = [f"{medians[f'{key}_ms']:.2f}" for key in ("loop", "network", "backbone")]
            ratios = [f"{medians[f'over_{key}']:.2f}" for key in ("network", "backbone")]
            steps.add_row(label(name), kind, str(medians["steps"]), *times, *ratios)
    shown = ("tokens_per_second", "tokens", "forwards", "tokens_per_forward", "rows_per_token", "edits")
    whole = Table(title="Whole generations, one prompt at a time", title_justify="left")
    for column in ("", "tokens/s", "tokens", "forwards", "tok/forward", "rows/tok", "edits", "decoder"):
        whole.add_column(column, justify="left" if column in ("", "decoder") else "right", no_wrap=True)
    for row in result["generation"]:
        cells = [f"{row[key]:.2f}" if isinstance(row[key], float) else str(row[key]) for key in shown]
        config = ", ".join(f"{key} {value}" for key, value in row["decoder"].items() if key != "name")
        whole.add_row(label(row["name"]), *cells, config)
    return [steps, whole]
