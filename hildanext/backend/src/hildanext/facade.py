"""What `from hildanext import load, generate, stream` gives: models by name, texts in and out, in any mode."""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, overload

from hildanext.core.config import validate
from hildanext.core.errors import ConfigError
from hildanext.core.runtime import RuntimeConfig
from hildanext.data.generation_result import GenerationResult
from hildanext.decoding import DECODERS, EXACT, ExactConfig, decoder_section, make_method, mode_name
from hildanext.exact import LoadedDrafter, generate_exact, only_exact
from hildanext.export.onnx_card import is_onnx_folder, read_onnx_card
from hildanext.inference import Event, GenerationConfig, OnEvent, generate
from hildanext.models.card import fast_section, read_card
from hildanext.models.loading.loaded_model import LoadedModel
from hildanext.models.loading.names import locate_diffusion
from hildanext.runtimes.choice import faster_runtime
from hildanext.runtimes.onnx_open import open_diffusion
from hildanext.tokenization import encode_prompt

Writer = Callable[[Sequence[Sequence[int]], GenerationConfig, OnEvent | None], list[GenerationResult]]
"""Prompts of token ids to their texts."""


def load_model(
    name: str = "tiny",
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    mode: str | None = None,
    parent: str | None = None,
    runtime: str = "auto",
) -> LoadedModel | LoadedDrafter:
    """A model with its tokenizer: `tiny` (inside the package) or a folder.

    A diffusion checkpoint; or with `mode="exact"`, or by a folder of draft adapters, a parent that drafts: `parent`
    names it where it is not where the adapters' card says, and by its own name it drafts from the text alone.
    Raises `ConfigError`, `UnknownChoice`, `ModelError` or `CheckpointError`, each with what to do about it.
    """
    asked = RuntimeConfig(device=device, dtype=dtype, threads=threads, runtime=runtime)
    exact = mode_name(mode) in EXACT if mode is not None else name != "tiny" and only_exact(name)
    if exact:
        return LoadedDrafter.open(name, faster_runtime(name, asked, parent), parent, adapters=False)
    if parent is not None:
        raise ConfigError("parent is about draft adapters", 'add mode="exact", or leave it out')
    return open_diffusion(name, asked)


def open_for(
    section: Mapping[str, Any], name: str, runtime: RuntimeConfig, parent: str | None = None
) -> LoadedModel | LoadedDrafter:
    """Whom the section of a decoder asks: a diffusion checkpoint, or for exact mode draft adapters (or, where none are
    needed, any autoregressive model). Raises what is wrong with the section before anything is loaded."""
    method = make_method(section)
    if not isinstance(method, ExactConfig):
        return open_diffusion(name, runtime)
    adapters = method.uses_adapters
    return LoadedDrafter.open(name, faster_runtime(name, runtime, parent, adapters), parent, adapters)


def fast_of(name: str) -> dict[str, Any] | None:
    """The decoder's section of a checkpoint's mode `fast`, or of an exported one's; None where nobody has measured it.

    Raises `ModelError` and `CheckpointError` for a name that is no diffusion checkpoint.
    """
    if is_onnx_folder(name):
        return fast_section(read_onnx_card(name).diffusion)
    return fast_section(read_card(locate_diffusion(name)))


def writer_of(model: LoadedModel | LoadedDrafter, section: Mapping[str, Any]) -> Writer:
    """What writes with `model` as the section of a decoder says, everything in it checked.

    Raises `ConfigError`, `UnknownChoice`; `ConfigError` too for a section of another kind of model.
    """
    method = make_method(section)
    if isinstance(model, LoadedDrafter):
        if not isinstance(method, ExactConfig):
            raise ConfigError(
                f"{model.name!r} is an autoregressive parent: {section['name']!r} is for diffusion models",
                "ask for mode exact",
            )
        placing, drafter, tokenizer = model.placing(method), model.drafter, model.tokenizer
        return lambda prompts, settings, on_event: generate_exact(
            drafter, tokenizer, prompts, method, settings, placing, on_event
        )
    if isinstance(method, ExactConfig):
        raise ConfigError(f"{model.name!r} was loaded as a diffusion model", 'for exact mode load it with mode="exact"')
    method.check_model(model.model)
    return lambda prompts, settings, on_event: generate(
        model.model, model.tokenizer, prompts, method, settings, on_event
    )


@overload
def generate_text(
    model: LoadedModel | LoadedDrafter, prompt: str, mode: str | None = ..., **options: Any
) -> GenerationResult: ...
@overload
def generate_text(
    model: LoadedModel | LoadedDrafter, prompt: Sequence[str], mode: str | None = ..., **options: Any
) -> list[GenerationResult]: ...
def generate_text(
    model: LoadedModel | LoadedDrafter, prompt: str | Sequence[str], mode: str | None = None, **options: Any
) -> GenerationResult | list[GenerationResult]:
    """Continue a text, or each of several in one batch: `text`, `tokens`, `finish_reason` and `stats` of each.

    `mode` is S_MODE where none is named, of a model that was loaded for it `exact`. Options: `effort`; `decoder`, a
    mapping of fields laid over the mode (`{"tau_edit": None}`) or another decoder's section (`{"name": ...}`); and the
    fields of `GenerationConfig` (`max_new_tokens`, `seed`, `stop`, ...). Raises `ConfigError`, `UnknownChoice`,
    `PromptError`.
    """
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    results = _text_run(model, texts, mode, **options)(None)
    return results[0] if isinstance(prompt, str) else results


def stream_text(
    model: LoadedModel | LoadedDrafter, prompt: str, mode: str | None = None, **options: Any
) -> Iterator[str]:
    """The pieces of `generate_text(...).text`, a finished block at a time, while the next one is being denoised.

    The model runs in a thread beside the reader; whoever stops reading stops it at its next forward. Raises what
    `generate_text` raises: at once what is wrong with the options, with the first piece what is wrong with the prompt.
    """
    return _pieces(_text_run(model, [prompt], mode, streams=True, **options))


class _Abandoned(Exception):
    """Nobody reads the stream any more."""


def _pieces(text_run: Callable[[OnEvent | None], list[GenerationResult]]) -> Iterator[str]:
    pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    unread = threading.Event()

    def on_event(event: Event) -> None:
        if unread.is_set():
            raise _Abandoned
        if event.kind == "text":
            pieces.put(event.text)

    with ThreadPoolExecutor(1) as executor:
        running = executor.submit(text_run, on_event)
        running.add_done_callback(lambda _: pieces.put(None))
        try:
            yield from iter(pieces.get, None)
        finally:
            unread.set()
            with suppress(_Abandoned):
                running.result()


def _text_run(
    model: LoadedModel | LoadedDrafter,
    texts: Sequence[str],
    mode: str | None,
    effort: str | None = None,
    decoder: Mapping[str, Any] | None = None,
    streams: bool = False,
    **settings: Any,
) -> Callable[[OnEvent | None], list[GenerationResult]]:
    """A generation with everything checked, to be run in any thread; a research decoder needs the caller's profile."""
    if mode is None and isinstance(model, LoadedDrafter):
        mode = "exact"
    fast = fast_section(model.card) if isinstance(model, LoadedModel) else None
    section = decoder_section(mode, effort, decoder, fast)
    writer = writer_of(model, section)
    if streams and section["name"] in DECODERS and DECODERS[section["name"]].searches:
        raise ConfigError(
            f"{section['name']} chooses its text in the end: it has no pieces to stream", "ask for the whole: generate"
        )
    chosen = validate(GenerationConfig, settings, where="settings of a generation")
    prompts = [encode_prompt(model.tokenizer, text) for text in texts]
    return lambda on_event: writer(prompts, chosen, on_event)
