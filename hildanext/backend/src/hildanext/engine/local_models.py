"""The models of our own engine: who is asked by a request, with which words, and how much room its text needs."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hildanext.ar import Parent
from hildanext.core.errors import ConfigError, PromptError
from hildanext.core.json_text import check_prompt_text
from hildanext.core.runtime import Runtime
from hildanext.data.chat_template import encode_chat
from hildanext.decoding import DIFFUSION_MODES, EXACT, Decoder, ExactConfig, decoder_section
from hildanext.decoding.detokenizer import Stop
from hildanext.detokenization import Detokenizer, TokenCells, cut_pieces
from hildanext.engine.base import Request, TokenScore
from hildanext.exact import LoadedDrafter
from hildanext.inference import check_prunable, checked_prompt
from hildanext.kv_cache.prune import Prune, make_prune
from hildanext.likelihood.next_token import NextToken
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.drafter import Drafter
from hildanext.models.packed_linear import PackedLinear
from hildanext.runtimes.onnx_blocks import OnnxDiffusion
from hildanext.runtimes.onnx_parent import OnnxParent
from hildanext.tokenization import encode_prompt, same_words


@dataclass
class LocalModels:
    """A diffusion model, an autoregressive parent, or both. `drafter` has the parent's own weights, and drafts."""

    model: DiffusionModel | None
    tokenizer: Any
    parent: Parent | None
    special_tokens_in_text: bool
    drafter: LoadedDrafter | None = None
    _encoding: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        own = self.parent.tokenizer if self.parent is not None else None
        same = own is None or own is self.tokenizer or same_words(own, self.tokenizer)
        self.parent_tokenizer = self.tokenizer if same else own
        """The model's where they have the same words, so that both are asked with the same template."""

    @property
    def first(self) -> DiffusionModel | Parent:
        """Who answers where nothing else is said."""
        first = self.model if self.model is not None else self.parent
        assert first is not None, "an engine without a model"
        return first

    @property
    def weights(self) -> str:
        """The type of the weights of who answers first."""
        first = self.first
        if isinstance(first, OnnxDiffusion | OnnxParent):
            return first.network.card.dtype
        return str(first.causal_lm.dtype).removeprefix("torch.")

    @property
    def modes(self) -> tuple[str, ...]:
        """What a request may ask for, the usual one first."""
        exact = tuple(EXACT) if self.parent is not None else ()
        return (*(DIFFUSION_MODES if self.model is not None else ()), *exact)

    def drafts(self, name: str, threads: int | None) -> LoadedDrafter | None:
        """The parent as it drafts, from the text alone where it has no adapters; None without a parent."""
        if self.drafter is None and self.parent is not None:
            causal_lm = self.parent.causal_lm
            runtime = Runtime(self.parent.device, causal_lm.dtype, threads or torch.get_num_threads())
            drafter = Drafter(causal_lm, None).eval()
            self.drafter = LoadedDrafter(name, drafter, self.parent_tokenizer, None, runtime)
        return self.drafter

    def check_changeable(self) -> None:
        """Raises `ConfigError` where who answers first computes with copies of the weights, which would stay behind."""
        first = self.first
        exported = isinstance(first, OnnxDiffusion | OnnxParent)
        if exported or any(isinstance(part, PackedLinear) for part in first.causal_lm.modules()):
            raise ConfigError(
                f"the engine computes with copies of the weights ({'an exported model' if exported else 'packed'})",
                "make a LocalEngine of the model that is trained, or open another one of the new weights",
            )

    def section(self, request: Request) -> dict[str, Any]:
        """Of its decoder; the usual mode's where it names none."""
        return dict(request.decoder) if request.decoder else decoder_section(self.modes[0])

    def check_given(self, request: Request, decoder: Any, room: int) -> None:
        """Raises `ConfigError` and `PromptError` for given tokens that cannot be written around, in an answer of `room`
        tokens."""
        if request.parent or request.scores or self.model is None or not isinstance(decoder, Decoder):
            raise ConfigError(
                f"{len(request.given)} tokens of the answer are given, and no diffusion model writes around them",
                "leave out given, or what asks for the parent, exact mode or scores",
            )
        if decoder.window > 0:
            raise ConfigError(
                f"tokens of the answer are given, and window {decoder.window} edits finished blocks", "give window 0"
            )
        for place, token in request.given:
            if not 0 <= place < room or not 0 <= token < len(self.model.banned) or bool(self.model.banned[token]):
                raise PromptError(
                    f"the token {token} is given for place {place} of an answer of {room} tokens",
                    "give ids that can be generated, at places from 0 on inside the answer",
                )

    def prune(self, request: Request, decoder: Any) -> Prune | None:
        """What the request's cache drops. Raises `ConfigError` where it is not the diffusion model's, and as
        `check_prunable`."""
        prune = make_prune(request.cache)
        if prune is None:
            return None
        if request.parent or request.scores or self.model is None or not isinstance(decoder, Decoder):
            raise ConfigError(
                "cache drops keys of a diffusion model, and another one answers this",
                "leave out cache, or what asks for the parent, exact mode or scores",
            )
        check_prunable(prune, self.model, decoder)
        return prune

    def is_exact(self, request: Request) -> bool:
        return not request.parent and self.section(request).get("name") in EXACT

    def asked(self, request: Request) -> tuple[DiffusionModel | Parent, Any]:
        """Who answers, and the tokenizer of its ids. Raises `ConfigError` for somebody who is not here."""
        if not request.parent and not self.is_exact(request):
            if self.model is None:
                raise ConfigError("there is no diffusion model here, but a parent that drafts", "ask for mode exact")
            return self.model, self.tokenizer
        if self.parent is None:
            raise ConfigError("this server has no autoregressive parent", "start it with --parent")
        return self.parent, self.parent_tokenizer

    def encode(self, request: Request) -> list[int]:
        """The prompt's ids. Raises `PromptError`, and `ConfigError` for a request that asks nobody or not one thing."""
        kinds = [request.prompt is not None, bool(request.messages), request.tokens is not None]
        if sum(kinds) != 1:
            raise ConfigError("a request has one of prompt, messages and tokens", f"this one has {sum(kinds)}")
        asked, tokenizer = self.asked(request)
        if request.scores and isinstance(asked, DiffusionModel) and asked.card.alignment != "parent":
            raise ConfigError(
                "this model has no likelihood of single tokens: its alignment is 'block', and predicts them in blocks",
                "ask the autoregressive parent, or measure a bound with hildanext eval",
            )
        for text in [request.prompt or "", *(message.content for message in request.messages), *request.stop]:
            check_prompt_text(text)
        with self._encoding:  # the tokenizers library borrows a tokenizer exclusively while it is set up
            if request.tokens is not None:
                ids = list(request.tokens)
            elif request.messages:
                ids = encode_chat(tokenizer, request.messages, self.special_tokens_in_text)
            else:
                ids = encode_prompt(tokenizer, request.prompt or "")
        if tokenizer is self.tokenizer and self.model is not None and self.model.card.mask_id in ids:
            raise PromptError("the prompt holds the mask token", "masks are the model's to fill: leave it out")
        return checked_prompt(asked, tokenizer, ids)


def one_by_one(model: DiffusionModel, tokenizer: Any) -> Parent:
    """A parent-aligned model as the autoregressive one that it is at block size 1."""
    if isinstance(model, OnnxDiffusion):
        return OnnxParent(model.network, tokenizer, model.banned)
    return Parent(model.causal_lm, tokenizer, model.banned)


def told_scores(
    tokenizer: Any, prompt: Sequence[int], ending: Stop, scores: Sequence[NextToken]
) -> tuple[TokenScore, ...]:
    """Of the prompt's tokens and the answer's, as text; `scores` are those of the document's from the second on."""
    of_prompt, of_answer = Detokenizer(tokenizer), Detokenizer(tokenizer, prompt)
    texts = cut_pieces(of_prompt.raws(prompt), of_prompt.text(prompt))
    texts += cut_pieces(of_answer.raws(ending.tokens), ending.text)
    tokens, cells = [*prompt, *ending.tokens], TokenCells(tokenizer, prompt)
    told = [TokenScore(texts[0][0], None, texts[0][1])]
    # What was drawn behind a stop is not told.
    for at, (score, own) in enumerate(zip(scores, texts[1:], strict=False), start=1):
        best = own if score.best == tokens[at] else cells.shown(at, score.best)
        told.append(TokenScore(own[0], score.logprob, own[1], best[0], score.best_logprob, best[1]))
    return tuple(told)


def check_served(decoder: Decoder | ExactConfig, section: Mapping[str, Any], model: DiffusionModel | None) -> None:
    """Raise `ConfigError` for a decoder that writes several texts of a prompt (an engine's rows are a text each), and
    as `Decoder.check_model` of the model that writes, None where it is another one."""
    if not isinstance(decoder, Decoder):
        return
    if model is not None:
        decoder.check_model(model)
    if decoder.searches:
        raise ConfigError(
            f"{section['name']} writes several texts of a prompt and chooses in the end: an engine shows each text "
            "while it is written",
            "take another decoder here, or this one in hildanext generate, eval and bench",
        )
