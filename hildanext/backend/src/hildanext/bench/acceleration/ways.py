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
from hildanext.eval.generation import ONE_PER_STEP, PARENT
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


Write = Callable[[Sequence[int], int], dict[str, Any]]
"""`write(prompt, seed)`: tokens, seconds, forwards by kind, edits, and the rows fed (None where they are not known)."""


class Writers:
    """Opens who writes, each once. The parent is under the vocabulary of `opened`, the model that is measured."""

    def __init__(self, opened: LoadedModel, parent: Parent, runtime: RuntimeConfig, new_tokens: int) -> None:
        self.opened, self.parent, self.runtime, self.new_tokens = opened, parent, runtime, new_tokens
        self._others: dict[tuple[Any, ...], Any] = {}

    def of(self, way: Way) -> Write:
        """Raises what opening the model of a way raises, and what is wrong with its section."""
        if way.section is None:
            return self._parent
        who = self._who(way)
        writer, rows = writer_of(who, way.section), RowCounter(who)
        block = 1 if way.section["name"] in EXACT else who.card.block_size

        def write(prompt: Sequence[int], seed: int) -> dict[str, Any]:
            settings = GenerationConfig(max_new_tokens=self.new_tokens, seed=seed)
            begun = time.perf_counter()
            with rows:
                (result,) = writer([list(prompt)], settings, None)
            # Whole blocks of the prompt are read, and not written.
            return _kept(result, time.perf_counter() - begun, rows.without(len(prompt) // block * block))

        write(self.opened.tokenizer("a")["input_ids"][-1:], 0)  # the first forward of a shape pays for allocations
        return write

    def _who(self, way: Way) -> Any:
        assert way.section is not None
        exact = way.section["name"] in EXACT
        if way.model is None and way.runtime == "auto" and way.dtype is None and not exact:
            return self.opened
        dtype = way.dtype if way.dtype is not None else self.runtime.dtype
        name = way.model if way.model is not None else self.opened.name
        key = (name, exact and way.section.get("drafter"), way.runtime, dtype)
        if key not in self._others:
            runtime = replace(self.runtime, dtype=dtype, runtime=way.runtime)
            self._others[key] = open_for(way.section, name, runtime)
        return self._others[key]

    def _parent(self, prompt: Sequence[int], seed: int) -> dict[str, Any]:
        begun = time.perf_counter()
        result = self.parent.generate(
            prompt, self.new_tokens, seed=seed, stop_ids=sorted(eos_ids(self.opened.model, self.opened.tokenizer))
        )
        return _kept(result, time.perf_counter() - begun, len(result.tokens))


def warm_up(writers: Writers) -> None:
    """The parent's and the model's first forwards, which pay for allocations."""
    prompt = writers.opened.tokenizer("a")["input_ids"][-1:]
    writers.of(Way("", ONE_PER_STEP))
    writers._parent(prompt, 0)


PARENT_WAY = Way(PARENT, None)


def _kept(result: GenerationResult, seconds: float, rows: int | None) -> dict[str, Any]:
    counts = {name: getattr(result.stats, name) for name in COUNTS}
    return {"tokens": list(result.tokens), "seconds": seconds, "rows": rows, **counts}


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

            def counted(tokens: Any, positions: Any, attention: Any) -> Any:
                self.rows += tokens.numel()
                return hidden(tokens, positions, attention)

            exported.hidden = counted  # type: ignore[method-assign]
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
