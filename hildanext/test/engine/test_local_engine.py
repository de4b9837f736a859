"""Our engine: whoever else is served, an answer is the same; nobody waits for ever; nothing is left behind."""

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from conftest import random_model
from decoding_stubs import StubTokenizer
from hildanext.ar import Parent
from hildanext.bench.engine_speed import together
from hildanext.core.config import config
from hildanext.core.errors import ConfigError, PromptError, UnknownChoice
from hildanext.decoding import DECODERS, Decoder, Edit, decoder_section, make_decoder
from hildanext.engine.base import (
    Cancelled,
    DeadlineExceeded,
    EngineFailed,
    Failed,
    Finished,
    Overloaded,
    Piece,
    Request,
    Started,
    Stepped,
    complete,
    stream,
)
from hildanext.engine.local import LocalEngine, LocalEngineConfig
from hildanext.inference import GenerationConfig, generate
from hildanext.likelihood.conditional import Pair, score_diffusion, score_parent

BLOCK = 4
WAYS = [
    decoder_section("S_MODE", tau_mask=0.3),
    decoder_section("Q_MODE", tau_mask=0.5, tau_edit=0.2, max_post=3),
    decoder_section("S_MODE", tau_mask=0.2, tau_edit=None),
    decoder_section("S_MODE", tau_mask=0.4, temperature=1.3, top_k=30),
    decoder_section("S_MODE", tau_mask=0.3, tau_edit=0.1, window=1),
]


def engine_of(model, parent=None, **settings) -> LocalEngine:
    return LocalEngine(model, StubTokenizer(bos=0), parent, LocalEngineConfig(**settings))


@pytest.fixture
def engine() -> Iterator[LocalEngine]:
    model = random_model("llama", "block", BLOCK)
    engine = engine_of(model, Parent(model.causal_lm, StubTokenizer(bos=0), banned=model.banned), slots=2, queue=2)
    yield engine
    engine.close()


def slow_down(engine: LocalEngine, seconds: float = 0.005) -> None:
    """Let every forward take at least so long, the parent's as well: no machine is too fast for what follows."""
    engine.model.causal_lm.model.register_forward_hook(lambda *_: time.sleep(seconds))


def requests(seed: int, count: int) -> list[Request]:
    """Prompts of many lengths, some with a common beginning, each with its own way, seed and length."""
    draw = random.Random(seed)
    shared = [draw.randrange(60) for _ in range(22)]
    made = []
    for number in range(count):
        head = shared[: draw.choice([0, 0, 9, 17, 22])]
        prompt = head + [draw.randrange(60) for _ in range(draw.randint(1, 15))]
        new = draw.randint(1, 23)
        made.append(
            Request(tokens=tuple(prompt), decoder=WAYS[number % len(WAYS)], max_new_tokens=new, seed=draw.randrange(99))
        )
    return made


def alone(model, request: Request) -> list[int]:
    settings = GenerationConfig(max_new_tokens=request.max_new_tokens, seed=request.seed, cached=False)
    decoder = make_decoder(dict(request.decoder))
    return generate(model, StubTokenizer(bos=0), [request.tokens], decoder, settings)[0].tokens


@pytest.mark.parametrize("alignment", ["block", "parent"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_answer_does_not_depend_on_who_else_is_served(alignment, dtype):
    """Token for token what the uncached reference writes alone, through turns, joins, parking and shared prefixes."""
    for seed, family in enumerate(("llama", "qwen3") if dtype is torch.float64 else ("qwen2",)):
        model = random_model(family, alignment, BLOCK, seed=seed, dtype=dtype)
        asked = requests(seed, 10)
        engine = engine_of(model, slots=3, quantum=1, prefill_tokens=8)
        answers: dict[int, list[int]] = {}
        whole = threading.Semaphore(0)

        def sink(number, event, answers=answers, whole=whole):
            if isinstance(event, Finished):
                answers[number] = event.answer.tokens
            if isinstance(event, Finished | Failed):
                whole.release()

        for number, request in enumerate(asked):
            engine.submit(request, lambda event, number=number: sink(number, event))
            time.sleep(0.002 * (number % 3))
        for _ in asked:
            assert whole.acquire(timeout=60)
        assert engine.load().cached_tokens > 0, "somebody began with another's blocks"
        engine.close()
        assert answers == {number: alone(model, request) for number, request in enumerate(asked)}


def test_the_events_of_a_request_come_in_order(engine):
    request = Request(tokens=(5, 6, 7, 8, 9), decoder=WAYS[0], max_new_tokens=10, steps=True, ignore_eos=True)
    events = list(stream(engine, request))
    assert isinstance(events[0], Started) and [cell.position for cell in events[0].prompt] == [0, 1, 2, 3, 4]
    assert isinstance(events[-1], Finished)
    assert {type(event) for event in events[1:-1]} == {Stepped, Piece}
    answer = events[-1].answer
    assert "".join(event.text for event in events if isinstance(event, Piece)) == answer.text
    steps = [event.record for event in events if isinstance(event, Stepped)]
    assert len(steps) == answer.stats.denoise_forwards + answer.stats.revise_forwards
    assert sum(len(step["edits"]) for step in steps) == answer.stats.edits
    assert answer.prompt_tokens == 5 and len(answer.tokens) == 10
    assert 0 <= answer.queue_seconds <= answer.first_piece_seconds <= answer.seconds


def test_what_nobody_asked_to_see_is_not_sent(engine):
    kinds = {type(event) for event in stream(engine, Request(tokens=(5, 6), decoder=WAYS[0], max_new_tokens=9))}
    assert kinds == {Started, Piece, Finished}


def test_a_second_request_with_the_same_beginning_is_not_prefilled_again(engine):
    prompt = tuple(range(1, 19))
    first = complete(engine, Request(tokens=prompt, decoder=WAYS[0], max_new_tokens=8))
    second = complete(engine, Request(tokens=prompt, decoder=WAYS[0], max_new_tokens=8))
    other = complete(engine, Request(tokens=(*prompt[:9], 40, 41, 42), decoder=WAYS[0], max_new_tokens=8))
    assert (first.cached_tokens, second.cached_tokens, other.cached_tokens) == (0, 16, 8)
    assert first.stats.prefill_forwards == 1 and second.stats.prefill_forwards == 0
    assert (
        first.tokens == second.tokens == alone(engine.model, Request(tokens=prompt, decoder=WAYS[0], max_new_tokens=8))
    )


@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_a_prompt_taken_over_whole_is_answered_as_if_it_were_fed(alignment):
    """Nothing clean is fed before the first block then: the state before it must have come along."""
    model = random_model("llama", alignment, BLOCK)
    engine = engine_of(model)
    asked = Request(tokens=tuple(range(1, 17)), decoder=WAYS[1], max_new_tokens=12)
    first, second = complete(engine, asked), complete(engine, asked)
    engine.close()
    assert (first.cached_tokens, second.cached_tokens) == (0, 16)
    assert second.tokens == first.tokens == alone(model, asked)


def test_an_ended_request_leaves_nothing_where_nothing_is_kept():
    engine = engine_of(random_model("llama", "block", BLOCK), keep_prefixes=False)
    complete(engine, Request(tokens=tuple(range(1, 17)), decoder=WAYS[1], max_new_tokens=12))
    assert len(engine.prefixes) == 0 and engine.load().cache_bytes == 0
    engine.close()


def test_requests_with_one_prompt_wait_for_the_first_to_feed_it():
    """As the choices of one request do: whoever comes while a prompt is being fed takes it over."""
    model = random_model("llama", "block", BLOCK)
    engine = engine_of(model, slots=4, prefill_tokens=8)
    gate = threading.Event()
    engine.submit(Request(tokens=(1, 2), decoder=WAYS[0], max_new_tokens=4), lambda event: gate.wait(5))
    prompt = tuple(range(1, 40))
    done: list[Finished] = []
    whole = threading.Semaphore(0)

    def sink(event):
        if isinstance(event, Finished):
            done.append(event)
            whole.release()

    for seed in range(3):
        engine.submit(Request(tokens=prompt, decoder=WAYS[3], max_new_tokens=8, seed=seed), sink)
    gate.set()
    assert all(whole.acquire(timeout=30) for _ in range(3))
    engine.close()
    assert sorted(event.answer.cached_tokens for event in done) == [0, 36, 36]


def test_the_parent_answers_as_it_does_alone(engine):
    for decoder, sampling in ((decoder_section(), {}), (WAYS[3], {"temperature": 1.3, "top_k": 30})):
        asked = Request(tokens=(3, 9, 27), decoder=decoder, max_new_tokens=12, seed=4, parent=True)
        answer = complete(engine, asked)
        theirs = engine.parent.generate([3, 9, 27], 12, seed=4, stop_ids=[], **sampling)
        assert answer.tokens == theirs.tokens and answer.stats.forwards == theirs.stats.forwards == 12


SAMPLINGS = [
    decoder_section(),
    decoder_section("S_MODE", temperature=1.3, top_k=30),
    decoder_section("S_MODE", temperature=0.8, top_p=0.9),
]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_requests_to_the_parent_share_forwards_and_are_answered_as_if_alone(family):
    """Prompts of many lengths, in pieces, greedy and sampled, taking turns: each text is `Parent.generate`'s own."""
    model = random_model(family, "block", BLOCK)
    parent = Parent(model.causal_lm, StubTokenizer(bos=0), banned=model.banned)
    engine = engine_of(model, parent, slots=5, quantum=1, prefill_tokens=6)
    draw = random.Random(7)
    wanted = [
        Request(
            tokens=tuple(draw.randrange(60) for _ in range(draw.randint(1, 20))),
            decoder=SAMPLINGS[number % 3],
            max_new_tokens=draw.randint(1, 14),
            seed=number,
            parent=True,
        )
        for number in range(9)
    ]
    answers, _ = together(engine, wanted)
    forwards, taken_part = engine.load().forwards, sum(answer.stats.forwards for answer in answers)
    assert engine.load().cache_bytes == 0
    engine.close()
    for number, request in enumerate(wanted):
        sampling = {key: request.decoder[key] for key in ("temperature", "top_p", "top_k") if key in request.decoder}
        theirs = parent.generate(request.tokens, request.max_new_tokens, seed=number, stop_ids=[], **sampling)
        assert answers[number].tokens == theirs.tokens, number
    assert forwards < taken_part / 2, "they were computed together"


@pytest.mark.parametrize("new", [0, 1, 5])
def test_scores_are_the_likelihood_of_the_whole_document_however_it_was_fed(new):
    """Of the parent, and of a diffusion model of its alignment: several at once, in pieces, taking turns."""
    model = random_model("llama", "parent", BLOCK)
    parent = Parent(random_model("qwen3", "block", BLOCK, seed=1).causal_lm, StubTokenizer(bos=0), banned=model.banned)
    engine = engine_of(model, parent, slots=3, quantum=1, prefill_tokens=6)
    draw = random.Random(3)
    prompts = [tuple(draw.randrange(60) for _ in range(length)) for length in (1, 2, 7, 20)]
    wanted = [
        Request(tokens=tokens, max_new_tokens=new, scores=True, parent=of_parent, ignore_eos=True)
        for tokens in prompts
        for of_parent in (True, False)
    ]
    answers, _ = together(engine, wanted)
    assert engine.load().cache_bytes == 0
    engine.close()
    for request, answer in zip(wanted, answers, strict=True):
        document = [*request.tokens, *answer.tokens]
        assert len(answer.tokens) == new and len(answer.scores) == len(document)
        assert answer.scores[0].logprob is None and answer.scores[0].best is None
        pairs = [Pair(tuple(document[:end]), (document[end],)) for end in range(1, len(document))]
        exact = score_parent(parent, pairs) if request.parent else score_diffusion(model, pairs, block_size=1)
        assert [one.kind for one in exact] == ["exact"] * len(pairs)
        assert [-one.logprob for one in answer.scores[1:]] == pytest.approx([one.nats for one in exact], abs=1e-9)
        for score in answer.scores[1:]:
            assert score.best_logprob >= score.logprob - 1e-12
        for score in answer.scores[len(request.tokens) :]:  # greedy: each is the most probable one
            assert score.best_logprob == score.logprob and score.best == score.text


def test_scores_end_where_a_stop_cut_the_text(engine):
    asked = Request(tokens=(3, 9), max_new_tokens=12, ignore_eos=True, parent=True, scores=True)
    whole = complete(engine, asked)
    cut = complete(engine, replace(asked, stop=(whole.text[6:9],)))
    assert cut.finish_reason == "stop" and len(cut.tokens) < 12 and len(cut.scores) == 2 + len(cut.tokens)
    chances = [[score.logprob for score in answer.scores[: len(cut.scores)]] for answer in (cut, whole)]
    assert chances[0] == chances[1]
    assert "".join(score.text for score in cut.scores[2:]) == cut.text, "what the stop cut off is nobody's piece"


def test_a_model_of_the_block_alignment_has_no_scores_and_nobody_writes_nothing(engine):
    with pytest.raises(ConfigError, match="alignment is 'block'.*ask the autoregressive parent"):
        engine.submit(Request(tokens=(1, 2), scores=True), lambda event: None)
    for parent in (True, False):
        with pytest.raises(ConfigError, match="0 new tokens"):
            engine.submit(Request(tokens=(1, 2), max_new_tokens=0, parent=parent), lambda event: None)


def test_a_prompt_longer_than_the_parent_s_context_is_refused(engine):
    other = random_model("llama", "block", BLOCK)
    other.causal_lm.config.max_position_embeddings = 16
    engine.parent.causal_lm = other.causal_lm
    with pytest.raises(PromptError, match="context of 16"):
        engine.submit(Request(tokens=(1,) * 12, max_new_tokens=8, parent=True), lambda event: None)


@config
class Rethinks(Decoder):
    """Another decoder with a window: fills a block at once, and rewrites in finished blocks what it sees otherwise."""

    window: int = 1

    def edit(self, logits, where, canvas):
        tokens = canvas.tokens.masked_scatter(where, logits.argmax(-1))
        write = (canvas.masked | canvas.editable) & (tokens != canvas.tokens)
        final = torch.ones(len(tokens), dtype=torch.bool)
        return Edit(write, tokens, torch.ones(tokens.shape, dtype=torch.float64), final)

    def after_block(self, denoiser, rows):
        denoiser.revise(self.window, self.edit, rows)


def test_any_decoder_with_a_window_revises_when_served_as_when_it_runs_alone(monkeypatch):
    """Beside rows of another decoder, each its own window; a decoder is asked through its own methods alone."""
    monkeypatch.setitem(DECODERS, "rethinks", Rethinks)
    model = random_model("llama", "block", BLOCK, seed=3)
    engine = engine_of(model, slots=4)
    sections = [{"name": "rethinks"}, WAYS[4], {"name": "rethinks", "window": 2}, WAYS[0]]
    wanted = [
        Request(tokens=(5, number), decoder=section, max_new_tokens=26) for number, section in enumerate(sections)
    ]
    answers, _ = together(engine, wanted)
    engine.close()
    for request, answer in zip(wanted, answers, strict=True):
        assert answer.tokens == alone(model, request)
        assert (answer.stats.revise_forwards > 0) == (request.decoder != WAYS[0])
    assert sum(answer.stats.edits for answer in answers) > 0


def test_a_long_request_does_not_keep_short_ones_waiting():
    """One place, a request of 40 blocks in it: a short one that comes later ends long before it."""
    model = random_model("llama", "block", BLOCK)
    engine = engine_of(model, slots=1, quantum=2)
    order: list[str] = []
    over = threading.Semaphore(0)

    def sink(name):
        def hear(event):
            if isinstance(event, Finished):
                order.append(name)
                over.release()

        return hear

    long = Request(tokens=(1, 2, 3), decoder=WAYS[1], max_new_tokens=160)
    engine.submit(long, sink("long"))
    for number in range(3):
        engine.submit(Request(tokens=(4, number), decoder=WAYS[1], max_new_tokens=12), sink("short"))
    assert all(over.acquire(timeout=60) for _ in range(4))
    assert order == ["short", "short", "short", "long"]
    assert complete(engine, long).tokens == alone(model, long), "parking and going on changes nothing"
    engine.close()


def test_a_full_queue_refuses_and_says_when_to_come_again(engine):
    hold = threading.Event()
    engine.submit(Request(tokens=(1,), decoder=WAYS[0], max_new_tokens=300), lambda event: hold.wait(10))
    time.sleep(0.1)
    with pytest.raises(Overloaded, match="waiting") as refused:
        for _ in range(6):
            engine.submit(Request(tokens=(1,), decoder=WAYS[0], max_new_tokens=300), lambda event: None)
    assert refused.value.status == 503 and refused.value.retry_after > 0
    assert engine.load().waiting + engine.load().running <= 4
    hold.set()


def test_a_cancelled_request_ends_and_gives_its_place_and_memory_back(engine):
    events: list[object] = []
    over = threading.Event()

    def sink(event):
        events.append(event)
        if isinstance(event, Failed):
            over.set()

    slow_down(engine)
    ticket = engine.submit(Request(tokens=(1, 2), decoder=WAYS[1], max_new_tokens=480), sink)
    ticket.cancel()
    assert over.wait(10) and isinstance(events[-1].error, Cancelled)
    ticket.cancel()  # again, and after its end
    load = engine.load()
    assert (load.running, load.waiting, load.finished["cancelled"]) == (0, 0, 1)
    assert load.cache_bytes == engine.prefixes.bytes
    assert len(complete(engine, Request(tokens=(1,), decoder=WAYS[0], max_new_tokens=4, ignore_eos=True)).tokens) == 4


def test_leaving_a_stream_early_cancels(engine):
    slow_down(engine)
    for event in stream(engine, Request(tokens=(1, 2), decoder=WAYS[1], max_new_tokens=480)):
        if isinstance(event, Piece):
            break
    deadline = time.monotonic() + 10
    while engine.load().running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.load().finished["cancelled"] == 1


@pytest.mark.parametrize("parent", [False, True])
def test_a_deadline_is_an_error(engine, parent):
    slow_down(engine)
    asked = Request(tokens=(1, 2), decoder=WAYS[1], max_new_tokens=500, deadline_seconds=0.05, parent=parent)
    with pytest.raises(DeadlineExceeded, match="0.05 s"):
        complete(engine, asked)
    assert engine.load().finished["deadline"] == 1


def test_a_request_that_waits_can_run_out_of_time_as_well(engine):
    hold = threading.Event()
    for _ in range(2):
        engine.submit(Request(tokens=(1,), decoder=WAYS[0], max_new_tokens=400), lambda event: hold.wait(0.2))
    with pytest.raises(DeadlineExceeded):
        complete(engine, Request(tokens=(1,), decoder=WAYS[0], max_new_tokens=8, deadline_seconds=0.01))
    hold.set()


def test_a_long_prompt_of_the_parent_is_fed_in_pieces_between_which_others_are_served(engine):
    engine.autoregressive.prefill_budget = 4
    alone = complete(engine, Request(tokens=tuple(range(1, 47)), max_new_tokens=5, ignore_eos=True, parent=True))
    assert (alone.stats.prefill_forwards, alone.stats.forwards) == (11, 16)
    assert alone.stats.tokens_per_forward == 1.0, "the parent writes one token a forward"
    order: list[str] = []
    whole = threading.Semaphore(0)

    def sink(name):
        def hear(event):
            order.extend([name] * isinstance(event, Piece))
            if isinstance(event, Finished | Failed):
                whole.release()

        return hear

    slow_down(engine)
    fast = decoder_section("S_MODE", tau_mask=0.0, tau_edit=None)
    engine.submit(Request(tokens=tuple(range(1, 47)), max_new_tokens=5, ignore_eos=True, parent=True), sink("parent"))
    engine.submit(Request(tokens=(1,), decoder=fast, max_new_tokens=8, ignore_eos=True), sink("diffusion"))
    for _ in range(2):
        assert whole.acquire(timeout=20)
    assert order[0] == "diffusion", "the short request need not wait for the long prompt"


def test_memory_admits_one_after_the_other():
    model = random_model("llama", "block", BLOCK)
    engine = engine_of(model, slots=4)
    engine.limit_bytes = engine.prefixes.limit_bytes = 60 * engine.token_bytes
    most = []

    def sink(event):
        most.append(engine.load().running)
        if isinstance(event, Finished | Failed):
            whole.release()

    whole = threading.Semaphore(0)
    for number in range(5):
        engine.submit(Request(tokens=(number, 2), decoder=WAYS[0], max_new_tokens=26), sink)
    assert all(whole.acquire(timeout=30) for _ in range(5))
    assert max(most) == 2, "two documents of 28 tokens fit into 60, three do not"
    assert engine.load().cache_bytes <= engine.limit_bytes
    with pytest.raises(PromptError, match="keys and values"):
        engine.submit(Request(tokens=(1, 2), decoder=WAYS[0], max_new_tokens=80), sink)
    engine.close()


WRONG = [
    (Request(), ConfigError, "one of prompt, messages and tokens"),
    (Request(prompt="w1", tokens=(1,)), ConfigError, "this one has 2"),
    (Request(tokens=(1,), max_new_tokens=10_000), PromptError, "ask for at most"),
    (Request(tokens=(61,)), PromptError, "mask token"),
    (Request(tokens=(77,)), PromptError, "no token"),
    (Request(prompt="half \ud800"), PromptError, "lone surrogate"),
    (Request(tokens=(1,), stop=("\udfff",)), PromptError, "lone surrogate"),
    (Request(tokens=(1,), decoder={"name": "guess"}), UnknownChoice, "choices"),
    (Request(tokens=(1,), decoder=decoder_section(tau_mask=1.5)), ConfigError, "1.5 is above 1"),
]


@pytest.mark.parametrize(("request_", "error", "words"), WRONG)
def test_what_can_never_be_answered_is_refused_at_once(engine, request_, error, words):
    heard: list[object] = []
    with pytest.raises(error, match=words):
        engine.submit(request_, heard.append)
    assert not heard and engine.load().waiting == engine.load().running == 0


def test_without_a_parent_nobody_can_ask_it():
    engine = engine_of(random_model("llama", "block", BLOCK))
    with pytest.raises(ConfigError, match="--parent"):
        engine.submit(Request(tokens=(1,), parent=True), lambda event: None)
    engine.close()


def test_closing_lets_what_runs_end_and_takes_no_more():
    engine = engine_of(random_model("llama", "block", BLOCK))
    events: list[object] = []
    engine.submit(Request(tokens=(1, 2), decoder=WAYS[0], max_new_tokens=40), events.append)
    engine.close(drain_seconds=30.0)
    assert isinstance(events[-1], Finished)
    with pytest.raises(Overloaded, match="closing"):
        engine.submit(Request(tokens=(1,)), events.append)
    assert not engine.load().alive


def test_closing_at_once_fails_what_runs():
    engine = engine_of(random_model("llama", "block", BLOCK))
    events: list[object] = []
    engine.submit(Request(tokens=(1, 2), decoder=WAYS[1], max_new_tokens=480), events.append)
    engine.close()
    assert isinstance(events[-1], Failed) and isinstance(events[-1].error, Overloaded)


def test_a_fault_in_the_model_thread_leaves_nobody_waiting(monkeypatch):
    engine = engine_of(random_model("llama", "block", BLOCK))
    raised: list[type] = []
    monkeypatch.setattr(threading, "excepthook", lambda what: raised.append(what.exc_type))

    def broken(**_):
        raise ZeroDivisionError

    monkeypatch.setattr(engine.model.causal_lm.model, "forward", broken)
    with pytest.raises(EngineFailed, match="model thread"):
        complete(engine, Request(tokens=(1, 2), decoder=WAYS[0], max_new_tokens=8))
    with pytest.raises(Overloaded):
        complete(engine, Request(tokens=(1, 2)))
    engine.close()
    assert not engine.load().alive and raised == [ZeroDivisionError], "the fault itself is in the log"
