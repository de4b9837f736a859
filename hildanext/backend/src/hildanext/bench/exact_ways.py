"""Ways to write the same answers: who writes, in which runtime, with which weights. One prompt at a time, greedily.

A runtime is one entry of `RUNTIMES`, which opens a `Network` of some weights; everything else is made from the list.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from hildanext.ar import Parent
from hildanext.bench.llama_cpp import LlamaCpp, gguf_of
from hildanext.core.runtime import RuntimeConfig, set_threads
from hildanext.decoding import DIFFUSION_MODES, MODES, make_decoder
from hildanext.decoding.base import run
from hildanext.decoding.exact.network import Network, network_of
from hildanext.decoding.exact.policy import ExactConfig, OnePlacement, Placing
from hildanext.decoding.exact.state import ExactRow, ExactState
from hildanext.decoding.state import DecodeState
from hildanext.exact import LoadedDrafter, placing_for
from hildanext.inference import eos_ids
from hildanext.models.draft_card import DraftCard
from hildanext.models.loading.load import load_parent
from hildanext.models.loading.loaded_model import LoadedModel
from hildanext.runtimes.onnx_open import open_diffusion, open_onnx

Who = Literal["transformers", "exact", "blocks", "llama.cpp"]


@dataclass(frozen=True)
class Answer:
    """What was written to one prompt, and what it took."""

    tokens: list[int]
    seconds: float
    first_seconds: float
    """Until the first token; where a block ends at once, until that."""
    first_tokens: int = 1
    """Tokens that were there by then."""
    forwards: int = 0
    """But the prefill's; 0 where it is not known."""
    rows: int = 0
    """Of these forwards."""


Write = Callable[[Sequence[int], int], Answer]
"""`write(prompt, new tokens)`."""


@dataclass(frozen=True)
class Way:
    """One row of the comparison."""

    name: str
    runtime: str
    weights: str
    who: Who
    drafter: str = "none"
    """Of exact decoding and of llama.cpp."""
    rows_of: str | None = None
    """The exact drafter in whose shape of forwards, and so with whose numbers, the parent writes."""
    alike: str | None = None
    """The way with whose numbers this one computes: its text is to be the same."""

    @property
    def network(self) -> tuple[str, str]:
        return self.runtime, self.weights


@dataclass(frozen=True)
class WaySettings:
    """What the ways have in common; all of it can be sent to another process."""

    model: str
    """A folder of draft adapters."""
    parent: str | None
    diffusion: str | None
    runtime: RuntimeConfig
    drafts: int | None = None
    after: Literal["auto", "all", "last"] = "auto"
    gguf_folder: Path = Path()


class Opened:
    """What ways write with, opened when it is first asked for."""

    def __init__(self, settings: WaySettings) -> None:
        self.settings = settings
        self.runtime = settings.runtime.resolve()
        self._networks: dict[tuple[str, str], Network] = {}
        self._blocks: dict[tuple[str, str], LoadedModel] = {}

    @cached_property
    def loaded(self) -> LoadedDrafter:
        return LoadedDrafter.open(self.settings.model, self.settings.runtime, self.settings.parent)

    @property
    def card(self) -> DraftCard:
        card = self.loaded.card
        assert card is not None, "a folder of draft adapters is asked for"
        return card

    @cached_property
    def parent_name(self) -> str:
        return self.settings.parent if self.settings.parent is not None else self.card.parent

    @cached_property
    def parent(self) -> Parent:
        """Plain weights, without adapters around their layers."""
        return Parent(*load_parent(self.parent_name, self.runtime.dtype, self.runtime.device))

    @cached_property
    def stops(self) -> frozenset[int]:
        return eos_ids(self.parent, self.parent.tokenizer)

    def network(self, runtime: str, weights: str) -> Network:
        if (runtime, weights) not in self._networks:
            self._networks[runtime, weights] = RUNTIMES[runtime](self, weights)
        return self._networks[runtime, weights]

    def runtime_of(self, runtime: str, weights: str) -> RuntimeConfig:
        """What a model of that runtime and weights is opened with."""
        asked = self.settings.runtime
        return asked if runtime == "torch" else replace(asked, device="cpu", dtype=weights, runtime=runtime)

    def blocks(self, runtime: str, weights: str) -> LoadedModel:
        """The diffusion checkpoint."""
        assert self.settings.diffusion is not None
        if (runtime, weights) not in self._blocks:
            opened = open_diffusion(self.settings.diffusion, self.runtime_of(runtime, weights))
            self._blocks[runtime, weights] = opened
        return self._blocks[runtime, weights]

    def exact_config(self, drafter: str) -> ExactConfig:
        settings = self.settings
        return ExactConfig(after=settings.after, drafter=drafter, drafts=settings.drafts)  # type: ignore[arg-type]

    def placing(self, way: Way) -> Placing:
        """Where masks stand; the parent at another's rows has every forward in that one's shape."""
        network = self.network(*way.network)
        runtime = self.runtime if way.runtime == "torch" else replace(self.runtime, dtype=network.dtype)
        card = self.card
        if way.rows_of is None:
            return placing_for(network, self.exact_config(way.drafter), card.acceptance, runtime)
        like = placing_for(network, self.exact_config(way.rows_of), card.acceptance, runtime)
        alone = ExactConfig(drafter="none", fixed_rows=True)  # junk where the other one has drafts
        return OnePlacement(alone, like.choose(_NewRow()))  # type: ignore[arg-type]

    def llama(self, weights: str, drafter: str) -> LlamaCpp:
        file = gguf_of(self.parent.causal_lm, self.parent.tokenizer, weights, self.settings.gguf_folder)
        drafts = self.settings.drafts if self.settings.drafts is not None else self.card.places
        return LlamaCpp(file, self.runtime.threads, drafts if drafter == "ngram" else None)

    def take_over(self, runtime: str) -> None:
        """Torch's threads as that runtime wants them: another one's are not to wait for torch's."""
        set_threads(self.runtime.threads if runtime == "torch" else 1)

    def writer(self, way: Way) -> Write:
        """Opens what the way needs. Raises as its loading does."""
        write = self._writer(way)

        def taking_over(prompt: Sequence[int], new: int) -> Answer:
            self.take_over(way.runtime)
            return write(prompt, new)

        return taking_over

    def _writer(self, way: Way) -> Write:
        if way.who == "transformers":
            return self._transformers()
        if way.who == "blocks":
            return self._denoising(self.blocks(*way.network), way.name.rpartition(" ")[2])
        if way.who == "llama.cpp":
            return self._llama(way)
        network, placing = self.network(*way.network), self.placing(way)
        return lambda prompt, new: self._exact(network, placing, prompt, new)

    def _transformers(self) -> Write:
        causal_lm, stops = self.parent.causal_lm, sorted(self.stops)

        @torch.no_grad()
        def write(prompt: Sequence[int], new: int) -> Answer:
            clock = _Clock()
            ids = torch.tensor([list(prompt)], device=self.runtime.device)
            how = GenerationConfig(
                max_new_tokens=new, do_sample=False, eos_token_id=stops or None, pad_token_id=stops[0] if stops else 0
            )
            with _plain_attention(causal_lm):
                out: Any = causal_lm.generate(  # type: ignore[operator]
                    ids, attention_mask=torch.ones_like(ids), generation_config=how, streamer=clock
                )
            tokens = out[0, len(prompt) :].tolist()
            return Answer(tokens, clock.passed(), clock.first, 1, len(tokens) - 1, len(tokens) - 1)

        return write

    def _exact(self, network: Network, placing: Placing, prompt: Sequence[int], new: int) -> Answer:
        clock, first = _Clock(), 0

        def ended(row: ExactRow) -> bool:
            nonlocal first
            if not first:
                clock.put(None)
                first = len(row.tokens) - row.prompt
            return len(row.tokens) >= row.limit or any(token in self.stops for token in row.tokens[row.prompt :])

        state = ExactState(network, placing.config, placing, ended)
        row = state.row(prompt, len(prompt) + new, 0, 0)
        state.prefill(row)
        while state.rows:
            state.step()
        tokens = _cut(row.tokens[row.prompt :], new, self.stops)
        return Answer(tokens, clock.passed(), clock.first, min(first, len(tokens)), row.forwards, row.rows)

    def _denoising(self, opened: LoadedModel, mode: str) -> Write:
        model, decoder = opened.model, make_decoder(dict(MODES[mode]))
        stops = eos_ids(model, opened.tokenizer)

        @torch.inference_mode()
        def write(prompt: Sequence[int], new: int) -> Answer:
            clock, first, written = _Clock(), 0, list[int]()

            def ended(row: Any, tokens: list[int]) -> bool:
                nonlocal first, written
                written = _cut(tokens[row.prompt :], new, stops)
                if written and not first:
                    clock.put(None)
                    first = len(written)
                return row.start >= row.limit or written[-1:] != [] and written[-1] in stops

            state = DecodeState(model, [list(prompt)], [len(prompt) + new], ended)
            every = [*state.rows, *state.joining]
            state.prefill()
            run(decoder, state)
            forwards = every[0].denoise + every[0].commit
            return Answer(written, clock.passed(), clock.first, first, forwards, forwards * model.card.block_size)

        return write

    def _llama(self, way: Way) -> Write:
        engine = self.llama(way.weights, way.drafter)
        tokenizer: Any = self.parent.tokenizer

        def write(prompt: Sequence[int], new: int) -> Answer:
            said = engine.complete(prompt, new)
            tokens = _cut(list(tokenizer(said.text, add_special_tokens=False)["input_ids"]), new, self.stops)
            return Answer(tokens, said.seconds, said.first_seconds, 1, said.forwards, said.rows)

        return write


class _NewRow:
    """A row that has shown nothing yet, as `Placing` looks at one."""

    forwards, offered, confirmed, placement = 0, (), (), None


class _Clock:
    """Seconds since it was made, and until the first token. Transformers tells it of tokens as it tells a streamer."""

    def __init__(self) -> None:
        self.began, self.first, self.told = time.perf_counter(), 0.0, 0

    def put(self, value: Any) -> None:
        self.told += 1
        if value is None or self.told == 2:  # a streamer is told of the prompt first
            self.first = self.passed()

    def end(self) -> None: ...

    def passed(self) -> float:
        return time.perf_counter() - self.began


@contextmanager
def _plain_attention(causal_lm: Any) -> Iterator[None]:
    """Within the context the model attends as Transformers has it."""
    ours = causal_lm.config._attn_implementation
    causal_lm.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        causal_lm.config._attn_implementation = ours


def _cut(tokens: Sequence[int], new: int, stops: frozenset[int]) -> list[int]:
    """At most `new` tokens, up to the first that ends a text."""
    kept = list(tokens[:new])
    ends = [at for at, token in enumerate(kept) if token in stops]
    return kept[: ends[0] + 1] if ends else kept


def _torch_network(opened: Opened, weights: str) -> Network:
    return network_of(opened.loaded.drafter)


def _onnx_network(opened: Opened, weights: str) -> Network:
    settings = opened.settings
    return open_onnx(settings.model, opened.runtime_of("onnx", weights), settings.parent).network


RUNTIMES: dict[str, Callable[[Opened, str], Network]] = {"torch": _torch_network, "onnx": _onnx_network}
"""How a runtime opens a network of the named weights."""
DRAFTERS = {"ngram": "ngram", "adapters": "adapters", "both": "ngram + adapters"}


def own_ways(opened: Opened, weights_of: Mapping[str, Sequence[str]]) -> list[Way]:
    """Every way of ours; `weights_of` names the weights of each runtime (torch's are those of the run)."""
    dtype = str(opened.runtime.dtype).removeprefix("torch.")
    ways = [
        Way("parent, transformers", "torch", dtype, "transformers"),
        Way("parent", "torch", dtype, "exact"),
        *_exact_ways("torch", dtype, fixed=not opened.network("torch", dtype).rows_alone),
    ]
    denoising = DIFFUSION_MODES if opened.settings.diffusion is not None else ()
    ways += [Way(f"blocks, {mode}", "torch", dtype, "blocks") for mode in denoising]
    for runtime, every in weights_of.items():
        for weights in every:
            ways.append(Way("parent", runtime, weights, "exact"))
            ways += _exact_ways(runtime, weights, fixed=False)
            ways += [Way(f"blocks, {mode}", runtime, weights, "blocks") for mode in denoising]
    return ways


def _exact_ways(runtime: str, weights: str, fixed: bool) -> list[Way]:
    """Where the rows are fixed their parents at the same numbers of rows, and exact decoding with each drafter."""
    parents = {drafter: "parent" for drafter in DRAFTERS}
    ways = []
    if fixed:
        parents = {"ngram": "parent, rows of ngram", "adapters": "parent, rows of adapters"}
        parents["both"] = parents["adapters"]
        for drafter in ("ngram", "adapters"):
            ways.append(Way(parents[drafter], runtime, weights, "exact", rows_of=drafter))
    return ways + [
        Way(f"exact, {name}", runtime, weights, "exact", drafter, alike=parents[drafter])
        for drafter, name in DRAFTERS.items()
    ]
