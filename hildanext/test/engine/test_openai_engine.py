"""The engine that asks a server elsewhere: what it sends, what it understands, and what it says when that fails."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi")

from hildanext.core.errors import ConfigError, ModelError, PromptError
from hildanext.data.chat_template import Message, set_template
from hildanext.decoding import decoder_section
from hildanext.engine import open_engine
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
from hildanext.engine.local import LocalEngineConfig
from hildanext.engine.remote.dialects import UNKNOWN_ID
from hildanext.engine.remote.http import ServerInfo, SSEDecoder, address_of, retry_after
from hildanext.engine.remote.openai import OpenAIConfig, OpenAIEngine
from hildanext.serve.settings import ServeConfig
from misbehaving import chunk, misbehaving, tells
from serving import ScriptedEngine, live, never

ASK = Request(prompt="a", max_new_tokens=8)


class opened:  # noqa: N801 - used as a context manager only
    """An engine on a server that does as told."""

    def __init__(self, act, **knobs) -> None:
        self.server = misbehaving(act)
        self.knobs = {"retry_seconds": 0.01, **knobs}

    def __enter__(self):
        server = self.server.__enter__()
        self.engine = open_engine({"name": "openai", "base_url": server.url, **self.knobs}, "small", "other")
        return self.engine, server

    def __exit__(self, *error) -> None:
        self.engine.close()
        self.server.__exit__(*error)


class TestAnswers:
    def test_text_counts_and_ending_are_the_server_s(self):
        with opened(tells) as (engine, server):
            events = list(stream(engine, ASK))
            answer = events[-1].answer
            assert [type(event) for event in events] == [Started, Piece, Piece, Piece, Finished]
            assert answer.text == "one two three" and answer.finish_reason == "length"
            assert answer.tokens == [UNKNOWN_ID] * 3 and answer.prompt_tokens == 4
            assert answer.stats.tokens_per_forward == 0.0 and not answer.edits_supported
            path, body, _ = server.asked[0]
            assert path == "/v1/completions" and body["prompt"] == "a" and body["max_tokens"] == 8
            assert body["model"] == "small" and body["temperature"] == 0.0 and "tau_mask" not in body
            assert engine.facts.context == 512 and engine.load().generated_tokens == 3

    def test_a_conversation_goes_to_the_chat_route_and_the_parent_by_its_name(self):
        def act(handler, body):
            handler.begin()
            handler.say({"choices": [{"delta": {"role": "assistant", "content": None}}]})
            handler.say({"choices": [{"delta": {"content": "hm"}, "finish_reason": "stop"}]}, b"data: [DONE]\n\n")

        with opened(act) as (engine, server):
            answer = complete(engine, Request(messages=(Message("user", "b"),), parent=True, stop=("x",), seed=7))
            assert answer.text == "hm" and answer.finish_reason == "stop"
            path, body, _ = server.asked[0]
            assert path == "/v1/chat/completions" and body["messages"] == [{"role": "user", "content": "b"}]
            assert body["model"] == "other" and body["stop"] == ["x"] and body["seed"] == 7

    def test_line_separators_and_split_characters_of_a_text_arrive(self):
        text = "ä\u2028b\x85c — d"

        def act(handler, body):
            handler.begin()
            handler.wfile.write(b": hello\r\n\r\n")
            for byte in f'data: {{"choices": [{{"text": "{text}", "finish_reason": "length"}}]}}\r\n\r\n'.encode():
                handler.say(bytes([byte]))
            handler.say(b"data: [DONE]\n\n")

        with opened(act) as (engine, _):
            assert complete(engine, ASK).text == text

    def test_the_key_comes_from_the_environment(self, monkeypatch):
        monkeypatch.setenv("SOME_KEY", "abc")
        with opened(tells, api_key_env="SOME_KEY") as (engine, server):
            complete(engine, ASK)
            assert server.asked[0][2]["Authorization"] == "Bearer abc"
        with pytest.raises(ConfigError, match="'NO_KEY' holds no key"):
            OpenAIConfig(base_url="http://x", api_key_env="NO_KEY").open("small", None, "")

    def test_many_at_once_are_bounded(self):
        most, now, lock = [0], [0], threading.Lock()

        def act(handler, body):
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            time.sleep(0.05)
            with lock:
                now[0] -= 1
            tells(handler, body)

        with opened(act, slots=2, queue=2) as (engine, _):
            ended: list[object] = []
            whole = threading.Semaphore(0)

            def sink(event):
                if isinstance(event, Finished | Failed):
                    ended.append(event)
                    whole.release()

            for _ in range(4):
                engine.submit(ASK, sink)
            with pytest.raises(Overloaded):
                engine.submit(ASK, sink)
            for _ in range(4):
                assert whole.acquire(timeout=10)
            assert all(isinstance(event, Finished) for event in ended) and most[0] == 2


class TestWishesOfOurOwn:
    @pytest.mark.parametrize(
        ("request_", "name"),
        [
            (Request(prompt="a", steps=True), "stream_denoising"),
            (Request(prompt="a", ignore_eos=True), "ignore_eos"),
            (Request(prompt="a", decoder=decoder_section("Q_MODE")), "tau_mask"),
            (Request(prompt="a", decoder=decoder_section("S_MODE", top_k=3)), "top_k"),
        ],
    )
    def test_a_server_that_cannot_be_asked_for_them_is_not(self, request_, name):
        with opened(tells) as (engine, server), pytest.raises(ConfigError, match=f"cannot be asked for .*{name}"):
            engine.submit(request_, lambda event: None)

    def test_no_server_is_asked_for_likelihoods(self):
        with opened(tells, ignore_extras=True) as (engine, server), pytest.raises(ConfigError, match="no likelihoods"):
            engine.submit(Request(prompt="a", scores=True), lambda event: None)

    def test_a_knob_leaves_them_out_and_another_sends_them(self):
        section = decoder_section("Q_MODE", top_k=3, temperature=0.5)
        with opened(tells, ignore_extras=True, extras=("top_k",)) as (engine, server):
            complete(engine, Request(prompt="a", decoder=section, ignore_eos=True))
            body = server.asked[0][1]
            assert body["top_k"] == 3 and body["temperature"] == 0.5
            assert "ignore_eos" not in body and "tau_mask" not in body


def cut(handler, body):
    handler.begin()
    handler.say(chunk("one "))
    handler.cut()


def says(*chunks):
    def act(handler, body):
        handler.begin()
        handler.say(*chunks)

    return act


def status(code, **headers):
    return lambda handler, body: handler.whole(code, {"error": {"message": "so it is"}}, **headers)


FAULTS = {
    "wrong key": (status(401), EngineFailed, r"refuses the key \(so it is\)"),
    "no model": (status(404), ModelError, "no such model or route"),
    "bad request": (status(422), ConfigError, r"refuses the request with 422 \(so it is\)"),
    "broken": (status(500), EngineFailed, "answers 500"),
    "elsewhere": (status(302, Location="http://127.0.0.1:9/"), EngineFailed, "answers 302"),
    "wants a long pause": (status(429, Retry_After="3600"), Overloaded, "overloaded"),
    "cut": (cut, EngineFailed, "before the text|cut the answer off"),
    "ends early": (says(chunk("one ")), EngineFailed, "before the text"),
    "ends without a reason": (says(chunk("one "), b"data: [DONE]\n\n"), EngineFailed, "without a reason"),
    "filters": (says(chunk("", "content_filter"), b"data: [DONE]\n\n"), EngineFailed, "'content_filter'"),
    "garbage": (says(b"data: {nonsense\n\n"), EngineFailed, "no JSON object"),
    "no text": (says(b"data: \xff\xfe\n\n"), EngineFailed, "no text"),
    "text that is a number": (says(chunk(5)), EngineFailed, "text that is none"),
    "no choices": (says({"hello": 1}), EngineFailed, "no choices"),
    "an error in the stream": (says({"error": {"message": "tired", "type": "x"}}), EngineFailed, "tired"),
    "not a stream": (lambda handler, body: handler.whole(200, {"choices": []}), EngineFailed, "application/json"),
    "a web page": (lambda h, body: h.whole(200, b"<html>", kind="text/html"), EngineFailed, "text/html"),
}


class TestFaults:
    @pytest.mark.parametrize("name", FAULTS)
    def test_a_fault_of_the_server_s_is_an_error_in_words(self, name):
        act, kind, words = FAULTS[name]
        with opened(act, retries=1) as (engine, _):
            with pytest.raises(kind, match=words) as caught:
                complete(engine, ASK)
            assert "\n" not in str(caught.value) and engine.load().finished["error"] == 1
            if name == "wants a long pause":
                assert caught.value.retry_after == 3600.0

    def test_an_event_without_an_end_is_not_read_for_ever(self, monkeypatch):
        monkeypatch.setattr("hildanext.engine.remote.http.LONGEST_EVENT", 1000)
        with opened(says(b"data: " + b"x" * 5000)) as (engine, _), pytest.raises(EngineFailed, match="without an end"):
            complete(engine, ASK)

    def test_what_may_pass_is_tried_again_and_not_for_ever(self):
        answers = [status(503), status(429, Retry_After="0"), tells]
        with opened(lambda handler, body: answers.pop(0)(handler, body)) as (engine, server):
            assert complete(engine, ASK).text == "one two three" and len(server.asked) == 3
        with opened(status(503), retries=2) as (engine, server):
            with pytest.raises(Overloaded):
                complete(engine, ASK)
            assert len(server.asked) == 3

    @pytest.mark.parametrize("how", ["reset", "cut"])
    def test_nothing_is_repeated_once_text_has_come(self, how):
        arrived = threading.Event()

        def act(handler, body):
            handler.begin()
            handler.say(chunk("one "))
            assert arrived.wait(5)  # a reset throws away what has not been read
            getattr(handler, how)()

        with opened(act, retries=5) as (engine, server):
            events = []
            for event in stream(engine, ASK):
                events.append(event)
                if isinstance(event, Piece):
                    arrived.set()
            assert [event.text for event in events if isinstance(event, Piece)] == ["one "] and len(server.asked) == 1
            assert isinstance(events[-1].error, EngineFailed)
            assert how == "cut" or "cut the answer off (ReadError)" in str(events[-1].error)

    def test_a_connection_that_is_reset_before_any_text_is_tried_again(self):
        acts = [lambda handler, body: handler.reset(), tells]
        with opened(lambda handler, body: acts.pop(0)(handler, body)) as (engine, server):
            assert complete(engine, ASK).text == "one two three" and len(server.asked) == 2

    @pytest.mark.parametrize("whose", ["the request's", "the engine's"])
    @pytest.mark.parametrize("what", ["silence", "a drip", "repetitions"])
    def test_the_time_of_a_request_bounds_everything(self, whose, what):
        release = threading.Event()

        def act(handler, body):
            if what == "silence":
                release.wait(10)
            elif what == "repetitions":
                handler.whole(503, {"error": {"message": "busy"}}, Retry_After="0.1")
            else:
                handler.begin()
                while not release.wait(0.02):
                    handler.say(chunk("x"))

        own = whose == "the request's"
        with opened(act, retries=10, request_seconds=600.0 if own else 0.3) as (engine, server):
            begun = time.perf_counter()
            with pytest.raises(DeadlineExceeded, match=r"within 0\.3 s"):
                complete(engine, Request(prompt="a", deadline_seconds=0.3 if own else 60.0))
            assert 0.25 < time.perf_counter() - begun < 3 and engine.load().finished["deadline"] == 1
            assert what != "repetitions" or len(server.asked) > 1
            release.set()

    def test_the_time_of_a_request_bounds_its_connection(self):
        with socket.socket() as listening:  # nobody accepts, and its queue is full: a further connection waits
            listening.bind(("127.0.0.1", 0))
            listening.listen(0)
            address = f"http://127.0.0.1:{listening.getsockname()[1]}"
            full = [socket.socket() for _ in range(4)]
            for connection in full:
                connection.setblocking(False)
                connection.connect_ex(listening.getsockname())
            engine = OpenAIEngine(
                OpenAIConfig(base_url=address, connect_seconds=30.0), address, {}, ServerInfo("m", None, None)
            )
            begun = time.perf_counter()
            with pytest.raises(DeadlineExceeded, match=r"within 0\.3 s"):
                complete(engine, Request(prompt="a", deadline_seconds=0.3))
            assert time.perf_counter() - begun < 3
            engine.close()
            for connection in full:
                connection.close()

    def test_the_engine_s_limit_begins_with_the_turn_and_a_request_s_own_with_its_submission(self):
        def act(handler, body):
            time.sleep(0.25)
            tells(handler, body)

        with opened(act, slots=1, request_seconds=0.6) as (engine, server):
            with ThreadPoolExecutor(4) as pool:
                texts = list(pool.map(lambda _: complete(engine, ASK).text, range(4)))
            assert texts == ["one two three"] * 4  # the last has waited longer than that
            with ThreadPoolExecutor(2) as pool:
                first = pool.submit(complete, engine, ASK)
                time.sleep(0.05)
                with pytest.raises(DeadlineExceeded):
                    complete(engine, Request(prompt="a", deadline_seconds=0.1))
                assert first.result().text

    def test_a_silent_server_is_left_in_time(self):
        release = threading.Event()

        def act(handler, body):
            release.wait(10)

        with opened(act, read_seconds=0.2) as (engine, server):
            with pytest.raises(EngineFailed, match="fell silent"):
                complete(engine, ASK)
            assert len(server.asked) == 1
            release.set()

    @pytest.mark.parametrize("how", ["cancel", "deadline", "close"])
    def test_who_stops_closes_the_stream(self, how):
        def act(handler, body):
            handler.begin()
            for _ in range(1000):
                handler.say(chunk("x"))
                time.sleep(0.01)

        with opened(act) as (engine, server):
            ended, begun = [], threading.Event()
            over = threading.Event()

            def sink(event):
                if isinstance(event, Piece):
                    begun.set()
                if isinstance(event, Finished | Failed):
                    ended.append(event)
                    over.set()

            limit = 0.2 if how == "deadline" else None
            ticket = engine.submit(Request(prompt="a", deadline_seconds=limit), sink)
            assert begun.wait(5)
            if how == "cancel":
                ticket.cancel()
                ticket.cancel()
            elif how == "close":
                engine.close()
            assert over.wait(5) and server.gone.wait(5)
            kind = {"cancel": Cancelled, "deadline": DeadlineExceeded, "close": Overloaded}[how]
            assert len(ended) == 1 and isinstance(ended[0].error, kind)
            assert not engine.load().running and not engine.load().waiting

    def test_a_request_that_makes_no_sense_never_leaves(self):
        with opened(tells) as (engine, server):
            for bad, kind in ((Request(), ConfigError), (Request(prompt="\ud800"), PromptError)):
                with pytest.raises(kind):
                    engine.submit(bad, lambda event: None)
            assert not server.asked

    def test_opening_says_what_is_wrong(self):
        with misbehaving(tells) as server:
            with pytest.raises(ModelError, match="has no model 'large': it has other, small"):
                OpenAIConfig(base_url=server.url + "/v1/").open("large", None, "")
            server.routes = {"/v1/models": {"data": 5}}
            with pytest.raises(EngineFailed, match="lists no models"):
                OpenAIConfig(base_url=server.url).open("small", None, "")
        with pytest.raises(EngineFailed, match="no server answers at"):
            OpenAIConfig(base_url=server.url).open("small", None, "")
        for url in ("ftp://x", "nonsense", "http://", "http://h:99999", "http://h/?a=1"):
            with pytest.raises(ConfigError, match="no address"):
                address_of(url)


@pytest.fixture(scope="module")
def ours():
    """Our own service around the embedded pair, the engine that asks it, and the engine inside it."""
    inside = LocalEngineConfig(threads=1, dtype="fp32", keep_prefixes=False).open("tiny", "tiny", "for a test")
    set_template(inside.tokenizer, "auto")
    with live(ServeConfig(port=0, jobs_folder=None), inside) as address:
        engine = open_engine({"base_url": address}, "tiny", "tiny-parent")
        yield engine, inside
        engine.close()


class TestAgainstOurOwnService:
    @pytest.mark.parametrize(
        "request_",
        [
            Request(prompt="Once upon a time", max_new_tokens=24),
            Request(prompt="Lily", decoder=decoder_section("Q_MODE", tau_edit=None), max_new_tokens=20, seed=3),
            Request(
                prompt="Tom", decoder=decoder_section("S_MODE", temperature=0.9, top_k=9), max_new_tokens=16, seed=5
            ),
            Request(messages=(Message("user", "Hi"),), max_new_tokens=16, ignore_eos=True),
            Request(tokens=(5, 6, 7), max_new_tokens=16, steps=True),
            Request(prompt="Once", max_new_tokens=12, parent=True, stop=(".",)),
        ],
        ids=["plain", "quality", "sampled", "chat", "steps", "parent"],
    )
    def test_an_answer_from_afar_is_the_one_from_inside(self, ours, request_):
        engine, inside = ours
        far, near = list(stream(engine, request_)), list(stream(inside, request_))
        one, other = far[-1].answer, near[-1].answer
        assert (one.text, one.tokens, one.finish_reason) == (other.text, other.tokens, other.finish_reason)
        assert one.prompt_tokens == other.prompt_tokens and one.stats.edits == other.stats.edits
        assert one.stats.forwards == other.stats.forwards
        assert one.stats.tokens_per_forward == pytest.approx(other.stats.tokens_per_forward)
        steps = [event.record for event in far if isinstance(event, Stepped)]
        assert steps == [event.record for event in near if isinstance(event, Stepped)]
        assert bool(steps) == request_.steps
        if request_.steps:
            assert far[0].prompt == near[0].prompt

    def test_its_facts_are_the_service_s(self, ours):
        engine, inside = ours
        assert engine.facts.block_size == inside.facts.block_size and engine.facts.supports_steps
        assert "a HILDA server, engine transformers" in engine.facts.reason

    def test_its_refusals_are_ours(self, ours):
        with pytest.raises(ConfigError, match="refuses the request"):
            complete(ours[0], Request(prompt="a", max_new_tokens=100_000))

    def test_cancelling_from_afar_cancels_inside(self):
        scripted = ScriptedEngine(never)
        with live(ServeConfig(port=0, jobs_folder=None), scripted) as address:
            engine = OpenAIConfig(base_url=address).open("scripted", None, "")
            ended = threading.Event()
            events: list[object] = []

            def sink(event):
                events.append(event)
                if isinstance(event, Started | Failed):
                    ended.set()

            ticket = engine.submit(ASK, sink)
            assert ended.wait(5)
            ticket.cancel()
            until = time.time() + 5
            while not (scripted.cancelled and isinstance(events[-1], Failed)) and time.time() < until:
                time.sleep(0.01)
            assert scripted.cancelled and isinstance(events[-1], Failed)
            engine.close()


class TestParts:
    def test_events_are_the_same_however_they_are_cut(self):
        text = b'event: a\r\ndata: {"x":\ndata: 1}\n\n: nothing\n\nid: 4\ndata:two\n\n'
        whole = SSEDecoder().feed(text)
        reader = SSEDecoder()
        assert [event for byte in text for event in reader.feed(bytes([byte]))] == whole
        assert whole == [("a", '{"x":\n1}'), ("", "two")]

    def test_retry_after_is_a_number_a_date_or_nothing(self):
        assert retry_after({"retry-after": "2.5"}) == 2.5
        assert retry_after({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
        assert retry_after({"retry-after": "soon"}) is None and retry_after({}) is None
        assert retry_after({"retry-after": "nan"}) is None
