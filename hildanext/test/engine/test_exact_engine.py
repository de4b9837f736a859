"""Exact mode in the engine: every answer is the parent's, whoever else is served, however it joins and leaves."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from conftest import random_model
from decoding_stubs import StubTokenizer
from hildanext.ar import Parent
from hildanext.core.errors import ConfigError, LogitsNotFinite, PromptError
from hildanext.core.runtime import Runtime
from hildanext.decoding import decoder_section
from hildanext.engine.base import Cancelled, Failed, Finished, Piece, Request, Started, Stepped, complete, stream
from hildanext.engine.local import LocalEngine, LocalEngineConfig
from hildanext.exact import ExactStats, LoadedDrafter
from hildanext.models.draft_card import DraftCard
from hildanext.models.drafter import Drafter
from hildanext.models.gated_lora import GatedLoraConfig
from small_models import small_causal

LORA = GatedLoraConfig(rank=4)
WAYS = [
    decoder_section("exact"),
    decoder_section("exact", after="all"),
    decoder_section("exact", after="last", drafts=2),
    decoder_section("exact", drafter="ngram"),
    decoder_section("exact", drafter="both", after="all"),
    decoder_section("exact", drafter="none"),
]


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch) -> None:
    """Measured costs of rows are kept beside the models."""
    monkeypatch.setenv("HILDANEXT_HOME", str(tmp_path / "home"))


def loaded(dtype: torch.dtype = torch.float64, scale: float = 0.05) -> LoadedDrafter:
    """A parent whose adapters say something, right or wrong."""
    drafter = Drafter(small_causal("qwen3", max_position_embeddings=256).to(dtype), LORA, 3).to(dtype).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in drafter.parameters():
            if parameter.requires_grad:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    card = DraftCard(parent="small", parent_hash="", places=3, lora=LORA, acceptance=(0.6, 0.4, 0.2))
    return LoadedDrafter("drafts", drafter, StubTokenizer(bos=0), card, Runtime(torch.device("cpu"), dtype, 1))


def engine_of(drafts: LoadedDrafter, model: Any = None, **settings: Any) -> LocalEngine:
    return LocalEngine(
        model, StubTokenizer(bos=0), drafts.parent, LocalEngineConfig(**settings), "drafts", "small", drafter=drafts
    )


@pytest.fixture
def engine() -> Iterator[LocalEngine]:
    engine = engine_of(loaded(), slots=3)
    yield engine
    engine.close()


def parents(request: Request, dtype: torch.dtype = torch.float64) -> list[int]:
    """What the parent writes alone: weights that never had adapters."""
    parent = Parent(small_causal("qwen3", max_position_embeddings=256).to(dtype), None)
    knobs = {name: request.decoder.get(name) for name in ("top_p", "top_k")}
    temperature = request.decoder.get("temperature", 0.0)
    return parent.generate(
        request.tokens, request.max_new_tokens, temperature, seed=request.seed, stop_ids=[], **knobs
    ).tokens


def requests(count: int) -> list[Request]:
    generator = torch.Generator().manual_seed(count)
    shared = torch.randint(3, 60, (40,), generator=generator).tolist()
    made = []
    for number in range(count):
        own = torch.randint(3, 60, (1 + number % 5,), generator=generator).tolist()
        prompt = (*shared[: (0, 20, 40)[number % 3]], *own)
        way = WAYS[number % len(WAYS)]
        if number % 4 == 3:
            way = {**way, "temperature": 1.1, "top_k": 20}
        made.append(
            Request(tokens=prompt, decoder=way, max_new_tokens=5 + 7 * (number % 6), seed=number, ignore_eos=True)
        )
    return made


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_answer_is_the_parents_through_turns_joins_and_shared_beginnings(dtype: torch.dtype) -> None:
    asked = requests(14)
    engine = engine_of(loaded(dtype), slots=3, quantum=1, prefill_tokens=12)
    answers: dict[int, list[int]] = {}
    whole = threading.Semaphore(0)

    def sink(number: int, event: Any) -> None:
        if isinstance(event, Finished):
            answers[number] = event.answer.tokens
        if isinstance(event, Finished | Failed):
            whole.release()

    tickets = []
    for number, request in enumerate(asked):
        tickets.append(engine.submit(request, lambda event, number=number: sink(number, event)))
        time.sleep(0.002 * (number % 3))
    tickets[4].cancel()
    for _ in asked:
        assert whole.acquire(timeout=60)
    load = engine.load()
    engine.close()
    answers.pop(4, None)
    assert answers == {number: parents(asked[number], dtype) for number in range(14) if number != 4}
    assert load.cached_tokens > 0, "somebody began with another's tokens"
    assert (load.running, load.waiting) == (0, 0) and load.cache_bytes == engine.exact_prefixes.bytes
    assert load.drafts > 0 and load.draft_tokens >= load.accepted_tokens == sum(load.accepted_per_position) > 0


def test_the_events_of_an_exact_request_come_in_order(engine: LocalEngine) -> None:
    request = Request(tokens=(5, 6, 7), decoder=WAYS[1], max_new_tokens=20, steps=True, ignore_eos=True)
    events = list(stream(engine, request))
    assert isinstance(events[0], Started) and isinstance(events[-1], Finished)
    answer = events[-1].answer
    assert "".join(event.text for event in events if isinstance(event, Piece)) == answer.text
    steps = [event.record for event in events if isinstance(event, Stepped)]
    assert {step["kind"] for step in steps} == {"exact"} and len(steps) == answer.stats.denoise_forwards
    written = sorted((cell["position"], cell.get("token", cell.get("new"))) for step in steps
                     for cell in [*step["drafts"], *step["edits"]])  # fmt: skip
    assert [token for _, token in written][:20] == answer.tokens
    assert isinstance(answer.stats, ExactStats) and answer.stats.edits == sum(len(step["edits"]) for step in steps)
    assert answer.stats.rows > answer.stats.denoise_forwards


def test_the_parent_answers_beside_it_on_the_same_weights(engine: LocalEngine) -> None:
    request = Request(tokens=(9, 8, 7, 6), decoder=WAYS[1], max_new_tokens=24, ignore_eos=True)
    exact, alone = complete(engine, request), complete(engine, Request(**{**vars(request), "parent": True}))
    assert exact.tokens == alone.tokens == parents(request)
    assert engine.parent is not None and engine.models.drafter is not None
    assert engine.parent.causal_lm is engine.models.drafter.drafter.causal_lm, "no second copy in memory"


def test_beside_a_diffusion_model_each_mode_has_its_own(engine: LocalEngine) -> None:
    both = engine_of(loaded(), random_model("qwen3", "block", 4))
    try:
        assert both.facts.modes == ("S_MODE", "Q_MODE", "exact") and engine.facts.modes == ("exact",)
        request = Request(tokens=(9, 8, 7, 6), decoder=WAYS[1], max_new_tokens=12, ignore_eos=True)
        assert complete(both, request).tokens == parents(request)
        denoised = complete(both, Request(tokens=(9, 8, 7, 6), max_new_tokens=12))
        assert not isinstance(denoised.stats, ExactStats)
    finally:
        both.close()


def test_likelihoods_of_an_exact_answer_are_the_parents(engine: LocalEngine) -> None:
    ask = {"tokens": (5, 6, 7, 9), "max_new_tokens": 6, "scores": True}
    exact = complete(engine, Request(decoder=WAYS[1], **ask))
    alone = complete(engine, Request(parent=True, **ask))
    assert exact.scores == alone.scores and len(exact.scores or ()) == 10


@pytest.mark.parametrize("mode", ["S_MODE", "Q_MODE"])
def test_a_mode_of_a_diffusion_model_is_refused_where_there_is_none(engine: LocalEngine, mode: str) -> None:
    with pytest.raises(ConfigError, match="no diffusion model here"):
        engine.submit(Request(tokens=(5,), decoder=decoder_section(mode)), lambda _: None)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"drafts": 4}, "drafts 4, and the adapters have learnt 3"),
        ({"drafter": "nobody"}, "'nobody' is no choice"),
        ({"sample_drafts": True}, "sample_drafts at temperature 0"),
        ({"sample_drafts": True, "temperature": 1.0}, "another text on another device"),
        ({"sample_drafts": True, "temperature": 1.0, "drafter": "ngram", "after": "all"}, "is about adapters"),
    ],
)  # fmt: skip
def test_knobs_that_do_not_fit_are_refused_before_anything_is_queued(
    engine: LocalEngine, knobs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        engine.submit(Request(tokens=(5,), decoder={"name": "exact", **knobs}), lambda _: None)


def test_a_prompt_that_fills_the_context_is_refused(engine: LocalEngine) -> None:
    with pytest.raises(PromptError, match="the prompt has 256 tokens, the model's context is 256"):
        engine.submit(Request(tokens=tuple([5] * 256), decoder=WAYS[1]), lambda _: None)
    with pytest.raises(PromptError, match=r"prompt \(250 tokens\) and 7 new tokens"):
        engine.submit(Request(tokens=tuple([5] * 250), decoder=WAYS[1], max_new_tokens=7), lambda _: None)
    whole = complete(engine, Request(tokens=tuple([5] * 250), decoder=WAYS[1], max_new_tokens=6, ignore_eos=True))
    assert len(whole.tokens) == 6


def test_a_parent_without_adapters_drafts_from_the_text_and_says_so_where_it_is_asked_for_more() -> None:
    model = random_model("qwen3", "block", 4)
    parent = Parent(small_causal("qwen3", max_position_embeddings=256).double(), StubTokenizer(bos=0))
    engine = LocalEngine(model, StubTokenizer(bos=0), parent)
    try:
        request = Request(tokens=(5, 6, 5, 6, 5), decoder=WAYS[3], max_new_tokens=40, ignore_eos=True)
        assert complete(engine, request).tokens == parents(request)
        with pytest.raises(ConfigError, match="this model has no draft adapters"):
            engine.submit(Request(tokens=(5,), decoder=WAYS[0]), lambda _: None)
    finally:
        engine.close()


def test_who_is_cancelled_or_has_no_numbers_leaves_the_others_their_text(engine: LocalEngine) -> None:
    request = Request(tokens=(5, 6, 7), decoder=WAYS[1], max_new_tokens=200, ignore_eos=True)
    events = stream(engine, request)
    assert isinstance(next(events), Started)
    events.close()
    failed: list[Any] = []
    engine.submit(request, failed.append).cancel()
    assert complete(
        engine, Request(tokens=(9, 8), decoder=WAYS[1], max_new_tokens=9, ignore_eos=True)
    ).tokens == parents(Request(tokens=(9, 8), max_new_tokens=9))
    assert isinstance(failed[-1], Failed) and isinstance(failed[-1].error, Cancelled)
    assert engine.parent is not None
    with torch.no_grad():
        engine.parent.causal_lm.model.norm.weight.fill_(float("nan"))
    with pytest.raises(LogitsNotFinite):
        complete(engine, request)
    assert engine.load().alive and engine.load().running == 0


def test_with_fixed_rows_an_answer_has_the_same_bits_alone_and_beside_others() -> None:
    """16-bit numbers depend on how many rows a forward has: each request has forwards of its own then."""
    engine = engine_of(loaded(torch.bfloat16), slots=4)
    asked = [Request(tokens=(5 + number, 6, 7), decoder=WAYS[1], max_new_tokens=24) for number in range(4)]
    try:
        alone = [complete(engine, request).tokens for request in asked]
        answers: dict[int, list[int]] = {}
        whole = threading.Semaphore(0)

        def sink(number: int, event: Any) -> None:
            if isinstance(event, Finished):
                answers[number] = event.answer.tokens
                whole.release()

        for number, request in enumerate(asked):
            engine.submit(request, lambda event, number=number: sink(number, event))
        for _ in asked:
            assert whole.acquire(timeout=60)
        assert [answers[number] for number in range(4)] == alone
    finally:
        engine.close()
