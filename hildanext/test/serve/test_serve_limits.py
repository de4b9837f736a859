"""Clients that are slow, greedy, gone or rude: a clear refusal or a bounded wait, and the server serves on."""

import json
import socket
import threading
import time

import httpx
import pytest

pytest.importorskip("fastapi")

from hildanext.cli import main
from hildanext.commands import serve as verb
from hildanext.core.errors import ConfigError
from hildanext.engine.base import Finished, Overloaded, Piece, Started
from hildanext.engine.local import LocalEngineConfig
from hildanext.serve.server import AddressError, bind
from hildanext.serve.settings import ServeConfig
from hildanext.stages.submission import open_jobs
from serving import ScriptedEngine, answer, at_once, events, live, never

QUICK = {"port": 0, "header_seconds": 0.6, "body_seconds": 0.6, "idle_seconds": 1.0, "shutdown_seconds": 1.0}
HEAD = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def connect(address: str) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def everything(connection: socket.socket) -> bytes:
    """What comes until the other side hangs up, which a client that goes on sending may hear as a reset."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def raw(address: str, request: bytes) -> bytes:
    with connect(address) as connection:
        connection.sendall(request)
        return everything(connection)


def until(condition, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


@pytest.fixture(scope="module")
def quick():
    with live(ServeConfig(**QUICK, max_body_bytes=4096, max_connections=40), ScriptedEngine()) as address:
        yield address


class TestSlowClients:
    def test_a_head_that_never_ends_is_a_408_in_time(self, quick):
        begun = time.monotonic()
        with connect(quick) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: ")
            threading.Thread(target=trickle, args=(connection, b"localhost" * 20), daemon=True).start()
            said = everything(connection)
        assert said.startswith(b"HTTP/1.1 408") and b"request_timeout" in said
        assert 0.5 < time.monotonic() - begun < 3

    def test_a_connection_that_says_nothing_is_closed_in_time(self, quick):
        with connect(quick) as connection:
            begun = time.monotonic()
            assert everything(connection) == b"" and time.monotonic() - begun < 3

    def test_a_second_request_that_trickles_is_bounded_like_the_first(self, quick):
        with connect(quick) as connection:
            connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            said = b""
            while b'{"status":"live"}' not in said:
                said += connection.recv(65536)
            threading.Thread(target=trickle, args=(connection, b"GET / HTTP/1.1\r\n" * 20), daemon=True).start()
            begun = time.monotonic()
            assert everything(connection).startswith(b"HTTP/1.1 408") and time.monotonic() - begun < 3

    def test_a_body_that_never_ends_is_a_408_in_time(self, quick):
        begun = time.monotonic()
        with connect(quick) as connection:
            connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
            threading.Thread(target=trickle, args=(connection, b" " * 500), daemon=True).start()
            said = everything(connection)
        assert said.startswith(b"HTTP/1.1 408") and b"connection: close" in said.lower()
        assert 0.5 < time.monotonic() - begun < 3

    def test_a_body_after_the_answer_does_not_hold_the_connection(self, quick):
        with connect(quick) as connection:
            connection.sendall(b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
            threading.Thread(target=trickle, args=(connection, b" " * 500), daemon=True).start()
            begun = time.monotonic()
            assert b"404" in everything(connection) and time.monotonic() - begun < 4

    def test_two_hundred_of_them_do_not_keep_others_waiting(self):
        settings = ServeConfig(**{**QUICK, "header_seconds": 4.0, "body_seconds": 4.0})
        with live(settings, ScriptedEngine()) as address:
            slow = [connect(address) for _ in range(200)]
            stop = threading.Event()
            thread = threading.Thread(target=drip, args=(slow, stop), daemon=True)
            thread.start()
            try:
                time.sleep(0.5)
                waits = []
                for _ in range(20):
                    begun = time.monotonic()
                    assert httpx.post(f"{address}/generate", json={"prompt": "a"}).json()["text"] == "well"
                    waits.append(time.monotonic() - begun)
                assert sorted(waits)[10] < 0.5
                begun = time.monotonic()
                said = [everything(client) for client in slow]
                assert time.monotonic() - begun < 10
                assert {client[:12] for client in said} <= {b"HTTP/1.1 408", b""} and sum(map(bool, said)) >= 100
            finally:
                stop.set()
                thread.join(5)
                for client in slow:
                    client.close()

    def test_an_answer_that_nobody_reads_is_dropped_and_its_text_cancelled(self):
        def flood(request, sink):
            sink(Started(1, 0, 0.0))
            for _ in range(2000):
                sink(Piece("x" * 10_000))

        engine = ScriptedEngine(flood)
        with live(ServeConfig(**{**QUICK, "write_seconds": 0.5}), engine) as address:
            with connect(address) as connection:
                body = b'{"prompt": "a"}'
                path = HEAD.replace(b"/generate", b"/generate/stream")
                connection.sendall(path + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                assert until(lambda: engine.cancelled)


def trickle(connection: socket.socket, text: bytes) -> None:
    """A byte every tenth of a second, until the other side has had enough."""
    for at in range(len(text)):
        try:
            connection.sendall(text[at : at + 1])
        except OSError:
            return
        time.sleep(0.1)


def drip(connections: list[socket.socket], stop: threading.Event) -> None:
    """A byte a second on each: half of them in the head, half of them in a body."""
    heads = [HEAD + (b"Content-Length: 4000\r\n\r\n" if at % 2 else b"") for at in range(len(connections))]
    for connection, head in zip(connections, heads, strict=True):
        connection.sendall(head)
    while not stop.wait(1.0):
        for connection in connections:
            try:
                connection.sendall(b"a")
            except OSError:
                pass  # the server has hung up, as it should


class TestGreedyClients:
    def test_a_body_is_counted_while_it_comes_and_who_sends_it_all_still_hears_why(self, quick):
        with connect(quick) as connection:
            connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
            for _ in range(1000):
                connection.sendall(b"400\r\n" + b"a" * 1024 + b"\r\n")
            connection.sendall(b"0\r\n\r\n")
            assert everything(connection).startswith(b"HTTP/1.1 413")

    def test_a_body_that_goes_on_for_ever_is_cut_off(self, quick):
        begun = time.monotonic()
        with connect(quick) as connection, pytest.raises(OSError):
            connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
            while time.monotonic() < begun + 8:
                connection.sendall(b"400\r\n" + b"a" * 1024 + b"\r\n")
        assert time.monotonic() - begun < 6

    def test_an_announced_size_is_enough_to_refuse(self, quick):
        for size, status in ((b"4097", b"413"), (b"9" * 20, b"413"), (b"9" * 30, b"400")):
            expecting = HEAD + b"Expect: 100-continue\r\nContent-Length: " + size + b"\r\n\r\n"
            assert raw(quick, expecting).startswith(b"HTTP/1.1 " + status)

    def test_what_is_no_http_is_told_so_in_the_one_shape(self, quick):
        for text in (b"\x16\x03\x01\x02\x00\r\n\r\n", b"hello\r\n\r\n", HEAD + b"Content-Length: -5\r\n\r\n"):
            said = raw(quick, text)
            head, _, body = said.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 400") and json.loads(body)["error"]["code"] == "invalid_http"

    def test_a_head_without_end_is_refused(self, quick):
        assert raw(quick, b"GET / HTTP/1.1\r\nA: " + b"a" * 100_000).startswith(b"HTTP/1.1 400")

    def test_connections_have_a_number(self, quick):
        held = [connect(quick) for _ in range(40)]
        try:
            for client in held:
                client.sendall(b"GET")
            with connect(quick) as late:
                said = everything(late)
            assert said.startswith(b"HTTP/1.1 503") and b"retry-after: 5" in said
        finally:
            for client in held:
                client.close()
        assert until(lambda: alive(quick))

    @pytest.mark.parametrize("path", [b"/jobs/a/artefacts/../../x", b"/static/../server.py", b"/static/..%2fserver.py"])
    def test_paths_that_climb_lead_nowhere(self, quick, path):
        said = raw(quick, b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert said.startswith(b"HTTP/1.1 404")


def alive(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health/live").status_code == 200
    except httpx.HTTPError:
        return False


class TestClientsThatGo:
    @pytest.mark.parametrize("path", ["/generate", "/generate/stream", "/v1/completions"])
    def test_their_text_is_cancelled(self, path):
        engine = ScriptedEngine(never)
        with live(ServeConfig(**QUICK), engine) as address:
            body = json.dumps({"prompt": "a", **({"model": "scripted"} if "v1" in path else {})}).encode()
            head = HEAD.replace(b"/generate", path.encode())
            with connect(address) as connection:
                connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                assert until(lambda: len(engine.requests) == 1)
                assert not engine.cancelled
            assert until(lambda: engine.cancelled == engine.requests) and alive(address)

    def test_all_choices_of_a_call_are_cancelled_and_so_are_those_beside_a_refused_one(self):
        engine = ScriptedEngine(never)
        submit = engine.submit

        def twice(request, sink):
            if len(engine.requests) == 2:
                raise Overloaded("full", "wait")
            return submit(request, sink)

        engine.submit = twice
        with live(ServeConfig(**QUICK), engine) as address:
            body = {"model": "scripted", "prompt": "a", "n": 3}
            assert httpx.post(f"{address}/v1/completions", json=body).status_code == 503
            assert until(lambda: len(engine.cancelled) == 2)

    def test_a_silent_stream_gives_signs_of_life(self):
        def late(request, sink):
            time.sleep(0.5)
            at_once(request, sink)

        with live(ServeConfig(**QUICK, keep_alive_seconds=0.1), ScriptedEngine(late)) as address:
            text = httpx.post(f"{address}/generate/stream", json={"prompt": "a"}).text
            assert text.count(": keep-alive") >= 3 and events(text)[-1][0] == "done"

    def test_one_that_follows_a_job_ends_with_the_server(self, tmp_path):
        with open_jobs(tmp_path) as service:
            job = service.submit("generate", {"generate": {"model": "tiny", "prompts": ["a"]}})
            service.start = lambda: None  # nobody takes the job: its events would never end
            with live(ServeConfig(**QUICK), ScriptedEngine(), service) as address:
                with httpx.stream("GET", f"{address}/jobs/{job.id}/events") as response:
                    lines = response.iter_lines()
                    assert next(lines).startswith("id: ")
            # leaving `live` asserts that the server has ended in time


class TestBrokenBodies:
    """Whatever a client does to its own body, it is never counted among our faults."""

    CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"

    @pytest.fixture
    def served(self, caplog):
        with caplog.at_level("INFO", "hildanext.access"), live(ServeConfig(**QUICK), ScriptedEngine()) as address:
            yield address
        assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]

    def counted(self, address):
        """Statuses of the answered requests, but for those of this very question."""
        lines = httpx.get(f"{address}/metrics").text.splitlines()
        counts = [line for line in lines if line.startswith("hilda_http_requests_total") and "/metrics" not in line]
        return {line.split('status="')[1][:3]: float(line.split()[-1]) for line in counts}

    @pytest.mark.parametrize("path", [b"/generate", b"/generate/stream", b"/v1/chat/completions", b"/nothing"])
    def test_a_client_that_goes_in_the_middle_of_its_body_is_counted_as_gone(self, served, path):
        with connect(served) as connection:
            connection.sendall(HEAD.replace(b"/generate", path) + b'Content-Length: 100\r\n\r\n{"prom')
        with connect(served) as connection:
            connection.sendall(self.CHUNKED.replace(b"/generate", path) + b"5\r\n{")
        assert until(lambda: self.counted(served) == {"499": 2.0}), self.counted(served)

    @pytest.mark.parametrize(
        "chunks",
        [b"zz\r\n{}\r\n", b"2\r\n{}0\r\n\r\n", b"-2\r\n{}\r\n", b"f" * 30 + b"\r\n", b"2\r\n{}\r\n0\r\nbad\r\n\r\n"],
    )
    def test_chunks_that_are_none_are_a_400_in_the_one_shape(self, served, chunks):
        head, _, body = raw(served, self.CHUNKED + chunks).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400") and json.loads(body)["error"]["code"] == "invalid_http"
        assert until(lambda: self.counted(served) == {"400": 1.0}), self.counted(served)

    @pytest.mark.parametrize("method", [b"POST", b"GET"])
    def test_two_lengths_of_one_body_are_refused_and_nothing_more_is_read(self, served, method):
        smuggled = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
        both = HEAD.replace(b"POST", method) + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n"
        said = raw(served, both + b"2\r\n{}\r\n0\r\n\r\n" + smuggled)
        assert (
            said.count(b"HTTP/1.1") == 1 and said.startswith(b"HTTP/1.1 400") and b"connection: close" in said.lower()
        )
        assert b"Content-Length and Transfer-Encoding: send one of them" in said
        assert self.counted(served) == {"400": 1.0}


class TestTheEnd:
    def test_running_texts_are_finished_and_the_engine_told_how_long(self):
        def slow(request, sink):
            sink(Started(1, 0, 0.0))
            time.sleep(0.6)
            sink(Finished(answer("late")))

        engine = ScriptedEngine(slow)
        got = []
        with live(ServeConfig(**QUICK), engine) as address:
            thread = threading.Thread(
                target=lambda: got.append(httpx.post(f"{address}/generate", json={"prompt": "a"}).json()["text"])
            )
            thread.start()
            assert until(lambda: engine.requests)
        thread.join(5)
        assert got == ["late"] and engine.closed_with[0] == 1.0

    def test_texts_that_take_longer_are_told_why_they_end(self):
        engine = LocalEngineConfig(threads=1, dtype="fp32").open("tiny", None, "for a test")
        got = []
        with live(ServeConfig(**{**QUICK, "shutdown_seconds": 0.2}), engine) as address:
            body = {"prompt": "Once", "max_new_tokens": 1000, "ignore_eos": True}
            thread = threading.Thread(
                target=lambda: got.append(httpx.post(f"{address}/generate", json=body, timeout=60))
            )
            thread.start()
            assert until(lambda: engine.load().running == 1, 20)
        thread.join(10)
        assert got[0].status_code == 503 and "closed" in got[0].json()["error"]["message"]
        assert int(got[0].headers["retry-after"]) >= 1


class TestTheVerb:
    @pytest.fixture(autouse=True)
    def never_really(self, monkeypatch):
        """What should have been refused fails the test, instead of serving until somebody comes."""
        monkeypatch.setattr("hildanext.serve.server.serve", lambda *_: pytest.fail("it would have served"))

    def test_an_address_in_use_is_one_line_and_exit_code_2(self, capsys):
        with bind(ServeConfig(port=0)) as taken:
            taken.listen()
            assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: cannot listen at 127.0.0.1:") and error.count("\n") == 1
        assert "another --port" in error

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (["--model", "nothing-there"], "nothing-there"),
            (["--parent", "nothing-there"], "nothing-there"),
            (["--set", "serve.prot=1"], "did you mean 'port'"),
            (["--port", "70000"], "65535"),
            (["--host", "no such host"], "no address"),
            (["--api-key-env", "NO_SUCH_VARIABLE"], "holds no key"),
            (["--engine", "fast"], "fast"),
            (["--dtype", "fp7"], "fp7"),
        ],
    )
    def test_what_cannot_be_served_is_one_line_and_exit_code_2(self, flags, said, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert main(["serve", "--port", "0", *flags] if "--port" not in flags else ["serve", *flags]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and said in error

    def test_a_configuration_without_the_section_is_an_error(self, tmp_path, capsys):
        (tmp_path / "run.json").write_text('{"stages": []}')
        assert main(["serve", "--config", str(tmp_path / "run.json")]) == 2
        assert "no section 'serve'" in capsys.readouterr().err

    def test_flags_lie_over_the_section_and_another_model_has_no_parent_by_itself(self):
        def settings(*flags):
            import argparse

            parser = argparse.ArgumentParser()
            verb.configure(parser)
            return verb.settings_of(parser.parse_args(flags))

        assert (settings().model, settings().parent) == ("tiny", "tiny")
        assert settings("--model", "x").parent is None and settings("--parent", "none").parent is None
        config = ("--config", "hildanext/runs/configs/default.json")
        default = settings(*config)
        assert (default.model, default.parent, default.chat_template) == ("tiny", "tiny", "plain")
        assert settings(*config, "--model", "x").parent is None
        assert settings(*config, "--set", "serve.max_choices=3", "--threads", "2").engine == {
            "name": "auto",
            "threads": 2,
        }

    def test_an_origin_with_a_path_and_a_negative_limit_are_errors(self):
        with pytest.raises(ConfigError, match="origin"):
            ServeConfig(cors=("example.org",))
        with pytest.raises(AddressError, match="no address"):
            bind(ServeConfig(host="no such host"))
