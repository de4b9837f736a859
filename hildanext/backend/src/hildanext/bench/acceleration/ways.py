"""A way to write, and who writes so: a decoder on a diffusion checkpoint in some runtime, exact mode, or the parent."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from hildanext.ar import Parent
from hildanext.core.runtime import RuntimeConfig
from hildanext.data.generation_result import GenerationResult
from hildanext.decoding import EXACT
from hildanext.eval.generation import PARENT
from hildanext.facade import open_for, writer_of
from hildanext.inference import GenerationConfig, eos_ids
from hildanext.models.loading.loaded_model import LoadedModel
from hildanext.runtimes.onnx_blocks import OnnxDiffusion

COUNTS = ("prefill_forwards", "denoise_forwards", "commit_forwards", "revise_forwards", "edits")
"""What is kept of an answer's `GenerationStats`, beside its tokens and seconds."""


@dataclass(frozen=True)
class Way:
    """One row of a table."""

    name: str
    section: Mapping[str, Any] | None
    """Of its decoder; None: the autoregressive parent."""
    model: str | None = None
    """None: the one that is measured."""
    runtime: str = "auto"
    dtype: str | None = None
    """None: that of the run."""

    @property
    def sampled(self) -> bool:
        """Whether what it writes depends on the seed."""
        return bool((self.section or {}).get("temperature", 0.0))

    def identity(self) -> dict[str, Any]:
        """What decides what it writes, whatever it is called."""
        return {key: value for key, value in asdict(self).items() if key != "name"}


Prompts = Sequence[Sequence[int]]
Write = Callable[[Prompts, int], list[dict[str, Any]]]
"""`write(prompts, seed)`: prompt i, drawn with seed + i, all of them together. Of each its tokens, forwards by kind and
edits; an equal share of the seconds and of the rows fed (None where they are not known)."""


WARM_TOKENS = 4


class Writers:
    """Opens who writes, each once. The parent is under the vocabulary of `opened`, the model that is measured.

    Each way writes a few tokens behind `prompt` before it is timed: the first forwards of a shape pay for allocations.
    """

    def __init__(
        self, opened: LoadedModel, parent: Parent, runtime: RuntimeConfig, new_tokens: int, prompt: Sequence[int]
    ) -> None:
        self.opened, self.parent, self.runtime, self.new_tokens = opened, parent, runtime, new_tokens
        self.prompt = prompt
        self._others: dict[tuple[Any, ...], Any] = {}

    def of(self, way: Way) -> Write:
        """Raises what opening the model of a way raises, and what is wrong with its section."""
        write = self._parent if way.section is None else self._write(way.section, self._who(way))
        write([self.prompt], 0, min(self.new_tokens, WARM_TOKENS))
        return lambda prompts, seed: write(prompts, seed, self.new_tokens)

    def _write(self, section: Mapping[str, Any], who: Any) -> Callable[[Prompts, int, int], list[dict[str, Any]]]:
        writer, rows = writer_of(who, section), RowCounter(who)
        block = 1 if section["name"] in EXACT else who.card.block_size

        def write(prompts: Prompts, seed: int, new_tokens: int) -> list[dict[str, Any]]:
            settings = GenerationConfig(max_new_tokens=new_tokens, seed=seed, batch_size=len(prompts))
            begun = time.perf_counter()
            with rows:
                results = writer(prompts, settings, None)
            # Whole blocks of the prompts are read, and not written.
            read = sum(len(prompt) // block * block for prompt in prompts)
            return _kept(results, time.perf_counter() - begun, rows.without(read))

        return write

    def _who(self, way: Way) -> Any:
        """The model of a way that is not the parent."""
        assert way.section is not None
        exact = way.section["name"] in EXACT
        if way.model is None and way.runtime == "auto" and way.dtype is None and not exact:
            return self.opened
        dtype = way.dtype if way.dtype is not None else self.runtime.dtype
        name = way.model if way.model is not None else self.opened.name
        key = (name, exact and way.section.get("drafter"), way.runtime, dtype)
        if key not in self._others:
            self._others[key] = open_for(way.section, name, replace(self.runtime, dtype=dtype, runtime=way.runtime))
        return self._others[key]

    def _parent(self, prompts: Prompts, seed: int, new_tokens: int) -> list[dict[str, Any]]:
        stops = sorted(eos_ids(self.opened.model, self.opened.tokenizer))
        seeds = range(seed, seed + len(prompts))
        begun = time.perf_counter()
        results = self.parent.generate_batch(prompts, new_tokens, seeds=seeds, stop_ids=stops)
        return _kept(results, time.perf_counter() - begun, sum(len(result.tokens) for result in results))


PARENT_WAY = Way(PARENT, None)


def _kept(results: Sequence[GenerationResult], seconds: float, rows: int | None) -> list[dict[str, Any]]:
    share = {"seconds": seconds / len(results), "rows": None if rows is None else rows / len(results)}
    return [
        {"tokens": list(result.tokens), **share, **{name: getattr(result.stats, name) for name in COUNTS}}
        for result in results
    ]


class RowCounter:
    """Rows that go through a network's first layer while it is entered; in ONNX Runtime those of a diffusion model."""

    def __init__(self, who: Any) -> None:
        self.network = getattr(who, "model", None) or getattr(who, "drafter", None)
        self.rows = 0
        self._remove: Callable[[], None] | None = None

    def __enter__(self) -> "RowCounter":
        self.rows = 0
        if isinstance(self.network, OnnxDiffusion):
            exported, hidden = self.network, self.network.hidden

            def counted(tokens: Any, *others: Any) -> Any:
                self.rows += tokens.numel()
                return hidden(tokens, *others)

            vars(exported)["hidden"] = counted
            self._remove = lambda: delattr(exported, "hidden")
        elif isinstance(self.network, nn.Module):
            network: Any = self.network
            layer: nn.Module = network.causal_lm.model.layers[0]
            self._remove = layer.register_forward_pre_hook(self._count, with_kwargs=True).remove
        return self

    def __exit__(self, *_: object) -> None:
        if self._remove is not None:
            self._remove()

    def without(self, prompt: int) -> int | None:
        """All but so many rows of the prompt; None where nothing could be counted."""
        return None if self._remove is None else max(self.rows - prompt, 0)

    def _count(self, _: nn.Module, states: tuple[Any, ...], named: dict[str, Any]) -> None:
        fed = states[0] if states else named["hidden_states"]
        self.rows += fed.shape[:-1].numel()
