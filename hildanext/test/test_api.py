"""The REST routes, asked inside this process."""

import json
import logging
import re

import pytest

pytest.importorskip("fastapi")

from hildanext.api import create_app
from hildanext.commands.serve import startup_line
from hildanext.core.errors import ConfigError
from hildanext.data.chat_template import set_template
from hildanext.engine.base import DeadlineExceeded, EngineFailed, Failed, Overloaded, Request, complete
from hildanext.engine.local import LocalEngine, LocalEngineConfig
from hildanext.serve.routers import page
from hildanext.serve.settings import ServeConfig
from hildanext.stages.submission import open_jobs
from serving import ScriptedEngine, ask, at_once, events


@pytest.fixture(scope="module")
def engine():
    opened = LocalEngineConfig(threads=1, dtype="fp32").open("tiny", "tiny", "for a test")
    set_template(opened.tokenizer, "auto")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def app(engine):
    return create_app(ServeConfig(), engine)


def error_of(response, status):
    """The error of a response, which must be in the one shape."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] and response.headers["x-request-id"]
    return body["error"]


class TestTexts:
    def test_an_answer_is_the_engine_s_own(self, app, engine):
        body = {"prompt": "Once upon a time", "max_new_tokens": 24, "tau_mask": 0.6, "seed": 3}
        answer = ask(app, "POST", "/generate", json=body).json()
        section = {"name": "threshold_edit", "tau_mask": 0.6, "tau_edit": 0.0, "max_post": 16}
        own = complete(engine, Request(prompt="Once upon a time", decoder=section, max_new_tokens=24, seed=3))
        assert answer["text"] == own.text and answer["tokens"] == own.tokens and answer["decoder"] == section
        assert answer["usage"]["forward_passes"] == own.stats.forwards
        assert answer["usage"]["completion_tokens"] == len(own.tokens) == 24
        assert answer["usage"]["prompt_tokens"] == own.prompt_tokens == 5 and answer["frames"] is None

    def test_a_stream_tells_a_start_every_forward_the_blocks_and_the_end(self, app):
        body = {"prompt": "Once upon a time", "max_new_tokens": 24}
        received = events(ask(app, "POST", "/generate/stream", json=body).text)
        names = [name for name, _ in received]
        assert names[0] == "start" and names[-1] == "done" and set(names[1:-1]) == {"frame", "block"}
        done, start = received[-1][1], received[0][1]
        assert "".join(data["text"] for name, data in received if name == "block") == done["text"]
        frames = [data for name, data in received if name == "frame"]
        assert len(frames) == done["usage"]["forward_passes"]
        canvas = {}
        for frame in frames:
            canvas |= {cell["position"]: cell["token"] for cell in frame["drafts"]}
            canvas |= {cell["position"]: cell["new"] for cell in frame["edits"]}
        written = [canvas[at] for at in sorted(canvas)][: len(done["tokens"])]
        assert written == done["tokens"] and len(start["prompt"]) == start["prompt_tokens"] == 5

    def test_a_stream_without_frames_has_none(self, app):
        body = {"prompt": "Once", "max_new_tokens": 8, "frames": False}
        names = [name for name, _ in events(ask(app, "POST", "/generate/stream", json=body).text)]
        assert "frame" not in names and names.count("block") >= 1

    def test_a_whole_answer_holds_its_frames_on_request(self, app):
        answer = ask(app, "POST", "/generate", json={"prompt": "Once", "max_new_tokens": 8, "frames": True}).json()
        assert len(answer["frames"]) == answer["usage"]["forward_passes"]

    def test_the_parent_answers_token_by_token(self, app, engine):
        body = {"prompt": "Once upon a time", "max_new_tokens": 6, "parent": True}
        answer = ask(app, "POST", "/generate", json=body).json()
        assert answer["text"] == complete(engine, Request(prompt=body["prompt"], max_new_tokens=6, parent=True)).text
        assert answer["model"] == "tiny-parent" and answer["usage"]["denoising_steps"] == 0

    def test_ids_and_text_are_the_same_prompt(self, app, engine):
        ids = engine.tokenizer("Once upon a time")["input_ids"]
        bodies = [{"prompt": "Once upon a time"}, {"tokens": [engine.tokenizer.bos_token_id, *ids]}]
        texts = [ask(app, "POST", "/generate", json={**b, "max_new_tokens": 8}).json()["text"] for b in bodies]
        assert texts[0] == texts[1]

    @pytest.mark.parametrize(
        ("fields", "knob", "value"),
        [
            ({"threshold": 0.9}, "tau_mask", 0.9),
            ({"editing_threshold": 0.4}, "tau_edit", 0.4),
            ({"edit_threshold": None}, "tau_edit", None),
            ({"tau_edit": "off"}, "tau_edit", None),
            ({"max_post_steps": 3}, "max_post", 3),
            ({"mode": "quality"}, "tau_mask", 0.7),
            ({"effort": "instant"}, "max_post", 0),
            ({"block_length": 8, "num_inference_steps": 8}, "tau_mask", 0.5),
        ],
    )
    def test_knobs_have_the_names_of_other_engines_too(self, app, fields, knob, value):
        answer = ask(app, "POST", "/generate", json={"prompt": "Once", "max_tokens": 2, **fields}).json()
        assert answer["decoder"][knob] == value


BAD = [
    ({}, "exactly one", None),
    ({"prompt": "a", "tokens": [1]}, "exactly one", None),
    ({"promt": "a"}, "did you mean prompt?", None),
    ({"prompt": 5}, "5 is no text", "prompt"),
    ({"prompt": None}, "exactly one", None),
    ({"prompt": "a", "tau_mask": 1.5}, "tau_mask: 1.5 is above 1, give 0 to 1", "tau_mask"),
    ({"prompt": "a", "tau_mask": "0.5"}, "'0.5' is no number, give 0 to 1", "tau_mask"),
    ({"prompt": "a", "tau_mask": True}, "true is no number", "tau_mask"),
    ({"prompt": "a", "tau_edit": "on"}, "give 0 to 1 or 'off', or null", "tau_edit"),
    ({"prompt": "a", "tau_mask": 0.5, "threshold": 0.5}, "given twice", None),
    ({"prompt": "a", "temperature": -1}, "-1 is below 0, give 0 to 100", "temperature"),
    ({"prompt": "a", "top_p": 0}, "0 is not above 0, give a number above 0 and at most 1", "top_p"),
    ({"prompt": "a", "top_k": 0}, "0 is below 1, give a whole number from 1 to", "top_k"),
    ({"prompt": "a", "seed": 2**70}, "", "seed"),
    ({"prompt": "a", "max_new_tokens": -1}, "-1 is below 1, give a whole number of at least 1", "max_new_tokens"),
    ({"prompt": "a", "max_new_tokens": 10**30}, "4096 at most", "max_new_tokens"),
    ({"prompt": "a", "max_new_tokens": 4097}, "4096 at most", "max_new_tokens"),
    ({"prompt": "a", "deadline_seconds": 1e9}, "300 s at most", "deadline_seconds"),
    ({"prompt": "a", "mode": "quick"}, "choices: Q_MODE, S_MODE", None),
    ({"prompt": "a", "effort": "huge"}, "unknown effort", None),
    ({"prompt": "a", "window": 1, "tau_edit": None}, "tau_edit is off", None),
    ({"prompt": "a", "block_size": 32}, "the model's own (8)", "block_size"),
    ({"prompt": "a", "steps": 2}, "cannot be promised", "steps"),
    ({"prompt": "a", "stop": ["x"] * 5}, "4 at most", "stop"),
    ({"prompt": "a", "stop": [""]}, "empty", "stop"),
    ({"prompt": "<|mask|>"}, "mask token", None),
    ({"prompt": "a" * 1_000_000}, "200000 at most", "prompt"),
    ({"prompt": "a b " * 40_000}, "context", None),
    ({"prompt": "a", "max_post": 1025}, "1025 is above 1024, give a whole number from 0 to 1024", "max_post"),
    ({"prompt": "a", "window": 1025}, "1025 is above 1024", "window"),
    ({"prompt": "a", "temperature": 101}, "101 is above 100, give 0 to 100", "temperature"),
    (
        {"prompt": "a", "decoder": {"max_post": 1025}},
        "max_post: 1025 is above 1024: this service takes 1024",
        "decoder",
    ),
    ({"prompt": "a", "decoder": {"temperature": 100.5}}, "temperature: 100.5 is above 100", "decoder"),
    ({"tokens": [-1] * 2000}, "tokens[0]: -1 is below 0", "tokens[0]"),
    ({"tokens": [-1]}, "-1 is below 0", "tokens[0]"),
    ({"tokens": [10**6]}, "", None),
    ({"messages": []}, "empty", "messages"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "'system'", "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "missing", "messages[0].content"),
    ({"messages": [{"role": "user", "content": "a", "tone": "b"}]}, "unknown field 'tone'", "messages[0]"),
    ([1], "JSON object", None),
    ("text", "JSON object", None),
]


@pytest.mark.parametrize(("body", "said", "param"), BAD, ids=range(len(BAD)))
def test_a_bad_body_is_a_400_that_says_what_and_where(app, body, said, param):
    error = error_of(ask(app, "POST", "/generate", json=body), 400)
    assert said in error["message"] and error["param"] == param and error["type"] == "invalid_request_error"
    assert len(error["message"]) < 1500
    streamed = error_of(ask(app, "POST", "/generate/stream", json=body), 400)
    assert streamed == error


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "no JSON"),
        (b'{"prompt": "a", "tau_mask": NaN}', "NaN, which is no number"),
        (b'{"prompt": "a", "tau_mask": -Infinity}', "-Infinity"),
        (b'{"prompt": "a", "tau_mask": 1e999}', "no finite number"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "number beyond reason"),
        (b'{"prompt": "\\ud800"}', "half a character"),
        (b'{"prompt": "a", "\\udfff": 1}', "half a character"),
        (b'{"prompt": "\xff"}', "no UTF-8"),
        (b"\xef\xbb\xbf{}", "no JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": ' * 50_000, "nested too deeply"),
        (b"", "the body is missing"),
    ],
    ids=range(12),
)
def test_what_is_no_json_is_a_400(app, content, said):
    headers = {"Content-Type": "application/json"}
    assert said in error_of(ask(app, "POST", "/generate", content=content, headers=headers), 400)["message"]


def test_an_empty_prompt_is_written_from_the_beginning_of_text(app):
    answer = ask(app, "POST", "/generate", json={"prompt": "", "max_new_tokens": 8}).json()
    assert answer["usage"]["prompt_tokens"] == 1 and answer["text"]


@pytest.mark.parametrize("kind", ["text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_another_content_type_is_a_415(app, kind):
    response = ask(app, "POST", "/generate", content=b'{"prompt": "a"}', headers={"Content-Type": kind})
    assert error_of(response, 415)["code"] == "media_type"


def test_a_body_beyond_the_limit_is_a_413_however_it_comes(engine):
    app = create_app(ServeConfig(max_body_bytes=2048), engine)

    async def chunks():
        for _ in range(100):
            yield b'{"prompt": "' + b"a" * 100

    headers = {"Content-Type": "application/json"}
    assert error_of(ask(app, "POST", "/generate", content=b" " * 2049, headers=headers), 413)
    assert error_of(ask(app, "POST", "/generate", content=chunks(), headers=headers), 413)["code"] == "body_too_large"
    assert ask(app, "POST", "/generate", json={"prompt": "a" * 1000, "max_new_tokens": 1}).status_code == 200


class TestRoutes:
    def test_an_unknown_route_and_method_are_told_in_the_one_shape(self, app):
        assert error_of(ask(app, "GET", "/nothing"), 404)["type"] == "not_found_error"
        response = ask(app, "POST", "/health")
        assert error_of(response, 405) and response.headers["allow"] == "GET"
        assert error_of(ask(app, "GET", "/generate"), 405)

    def test_head_is_get_without_a_body(self, app):
        response = ask(app, "HEAD", "/health/live")
        assert response.status_code == 200 and response.content == b"" and response.headers["content-length"] == "17"

    def test_options_names_the_methods(self, app):
        response = ask(app, "OPTIONS", "/generate")
        assert response.status_code == 204 and response.headers["allow"] == "POST, OPTIONS"

    def test_health_tells_model_engine_reason_device_versions_and_load(self, app):
        health = ask(app, "GET", "/health").json()
        assert health == ask(app, "GET", "/health/ready").json() | {"uptime_seconds": health["uptime_seconds"]}
        assert health["model"] == "tiny" and health["parent"] == "tiny-parent" and health["device"] == "cpu"
        assert health["engine"]["name"] == "transformers" and health["engine"]["reason"] == "for a test"
        assert health["versions"]["torch"] and health["load"]["alive"] and health["dtype"] == "float32"

    def test_health_tells_whether_the_model_has_a_chat_template_of_its_own(self, app, engine):
        assert engine.tokenizer.chat_template is not None  # lent by the service
        assert ask(app, "GET", "/health").json()["engine"]["chat_template"] is False
        taught = LocalEngine(engine.model, engine.tokenizer, name="taught")
        assert ask(create_app(ServeConfig(), taught), "GET", "/health").json()["engine"]["chat_template"] is True
        taught.close()
        assert (
            ask(create_app(ServeConfig(), ScriptedEngine()), "GET", "/health").json()["engine"]["chat_template"] is None
        )

    def test_the_startup_line_has_the_names_that_requests_take(self, app):
        said = startup_line("http://127.0.0.1:1", app.state.service)
        names = [card["id"] for card in ask(app, "GET", "/v1/models").json()["data"]]
        assert f"serves {names[0]} beside its parent {names[1]} with transformers" in said and "1 thread;" in said

    def test_an_engine_that_has_died_is_not_ready_but_the_process_lives(self):
        engine = ScriptedEngine()
        app = create_app(ServeConfig(), engine)
        assert ask(app, "GET", "/health").status_code == 200
        engine.close()
        response = ask(app, "GET", "/health/ready")
        assert error_of(response, 503) and response.headers["retry-after"] == "5"
        assert ask(app, "GET", "/health/live").json() == {"status": "live"}

    def test_metrics_count_what_was_done(self, engine):
        app = create_app(ServeConfig(), engine)
        ask(app, "POST", "/generate", json={"prompt": "Once", "max_new_tokens": 8})
        ask(app, "POST", "/generate", json={"promt": "Once"})
        text = ask(app, "GET", "/metrics").text
        assert 'hilda_http_requests_total{method="POST",route="/generate",status="200"} 1.0' in text
        assert 'hilda_http_requests_total{method="POST",route="/generate",status="400"} 1.0' in text
        assert 'hilda_request_seconds_count{by="diffusion"} 1.0' in text
        for name in (
            "prompt_tokens_total generation_tokens_total cached_tokens_total forwards_total denoising_steps_total "
            "edits_total blocks_total requests_running requests_waiting kv_usage cache_hit_rate texts_total"
        ).split():
            assert re.search(rf"^hilda_{name}[ {{]", text, re.MULTILINE), name

    def test_paths_that_nobody_knows_are_one_label(self, app):
        for number in range(3):
            ask(app, "GET", f"/made-up-{number}")
        assert "made-up" not in ask(app, "GET", "/metrics").text

    def test_the_page_and_its_files_are_served_and_nothing_else(self, app):
        index = ask(app, "GET", "/")
        assert index.status_code == 200 and "<!doctype html>" in index.text.lower()
        assert "default-src 'self'" in index.headers["content-security-policy"]
        names = sorted(path.name for path in page.folder().iterdir())
        assert all(ask(app, "GET", f"/static/{name}").status_code == 200 for name in names)
        for name in ("../api.py", "%2e%2e/page.py", "..%2fpage.py", "/etc/passwd", "nothing", "", "%00"):
            assert error_of(ask(app, "GET", f"/static/{name}"), 404)

    def test_the_list_of_routes_loads_nothing_and_names_them_all(self, app):
        text = ask(app, "GET", "/docs").text
        assert "http://" not in text and "https://" not in text and "<script" not in text
        assert all(path in text for path in app.openapi()["paths"])

    def test_the_openapi_document_knows_one_shape_of_errors(self, app):
        document = ask(app, "GET", "/openapi.json").json()
        assert "ValidationError" not in json.dumps(document)
        for methods in document["paths"].values():
            for method in methods.values():
                for status, response in method["responses"].items():
                    if int(status) >= 400:
                        schema = response["content"]["application/json"]["schema"]
                        assert schema == {"$ref": "#/components/schemas/ErrorAnswer"}
        assert "ErrorDetail" in document["components"]["schemas"]


class TestDoor:
    def test_a_request_keeps_a_sane_id_and_gets_one_for_any_other(self, app):
        response = ask(app, "GET", "/health/live", headers={"X-Request-ID": "a-1.b"})
        assert response.headers["x-request-id"] == "a-1.b"
        for odd in ("a b", "x" * 200, "é".encode("latin-1").decode("latin-1"), '"'):
            response = ask(app, "GET", "/health/live", headers={"X-Request-ID": odd.encode("latin-1")})
            assert re.fullmatch(r"[0-9a-f]{16}", response.headers["x-request-id"])

    def test_every_request_is_one_line_of_json_in_the_log(self, app, caplog):
        with caplog.at_level(logging.INFO, "hildanext.access"):
            ask(app, "POST", "/generate?key=hidden", json={"promt": 1}, headers={"X-Request-ID": "mine"})
        line = json.loads(caplog.records[-1].message)
        assert line["id"] == "mine" and line["status"] == 400 and line["path"] == "/generate"
        assert line["method"] == "POST" and line["seconds"] >= 0

    def test_without_the_key_only_health_and_the_page_answer(self, engine, monkeypatch, caplog):
        monkeypatch.setenv("A_KEY", "secret-key")
        app = create_app(ServeConfig(api_key_env="A_KEY"), engine)
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret-key"}):
            response = ask(app, "GET", "/v1/models", headers=header)
            assert error_of(response, 401)["type"] == "authentication_error"
            assert response.headers["www-authenticate"] == "Bearer"
        assert ask(app, "GET", "/v1/models", headers={"Authorization": "Bearer é".encode()}).status_code == 401
        assert ask(app, "GET", "/nothing").status_code == 401
        for path in ("/health", "/health/live", "/health/ready", "/", "/docs", "/openapi.json", "/static/icon.svg"):
            assert ask(app, "GET", path).status_code == 200
        with caplog.at_level(logging.DEBUG):
            good = ask(app, "GET", "/v1/models", headers={"Authorization": "Bearer secret-key"})
        assert good.status_code == 200 and "secret" not in caplog.text

    @pytest.mark.parametrize("value", [None, "", " a", "schlüssel"])
    def test_a_variable_without_a_key_is_an_error_at_the_start(self, value, monkeypatch):
        monkeypatch.delenv("A_KEY", raising=False)
        if value is not None:
            monkeypatch.setenv("A_KEY", value)
        with pytest.raises(ConfigError, match="holds no key"):
            create_app(ServeConfig(api_key_env="A_KEY"), ScriptedEngine())

    def test_pages_elsewhere_may_call_only_where_they_are_named(self, engine):
        headers = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
        closed = ask(create_app(ServeConfig(), engine), "OPTIONS", "/generate", headers=headers)
        assert "access-control-allow-origin" not in closed.headers
        app = create_app(ServeConfig(cors=("https://a.example",)), engine)
        opened = ask(app, "OPTIONS", "/generate", headers=headers)
        assert opened.headers["access-control-allow-origin"] == "https://a.example"
        failed = ask(app, "POST", "/generate", json={}, headers={"Origin": "https://a.example"})
        assert failed.headers["access-control-allow-origin"] == "https://a.example"
        other = ask(app, "POST", "/generate", json={}, headers={"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers

    def test_another_name_is_refused_on_loopback_and_not_elsewhere(self, engine):
        headers = {"Host": "rebound.example:8000"}
        assert error_of(ask(create_app(ServeConfig(), engine), "GET", "/health/live", headers=headers), 421)
        for settings in (ServeConfig(host="0.0.0.0"), ServeConfig(hosts=("rebound.example",))):
            assert ask(create_app(settings, engine), "GET", "/health/live", headers=headers).status_code == 200
        for name in ("localhost:1", "127.0.0.1", "[::1]:8000", "LOCALHOST"):
            app = create_app(ServeConfig(), engine)
            assert ask(app, "GET", "/health/live", headers={"Host": name}).status_code == 200


def refusing(error):
    engine = ScriptedEngine()

    def submit(request, sink):
        raise error

    engine.submit = submit
    return create_app(ServeConfig(), engine)


def failing(error):
    return create_app(ServeConfig(), ScriptedEngine(lambda request, sink: sink(Failed(error))))


class TestEngineErrors:
    @pytest.mark.parametrize("path", ["/generate", "/generate/stream", "/v1/completions"])
    def test_a_full_queue_is_a_503_that_says_when_to_come_again(self, path):
        body = {"prompt": "a"} if path != "/v1/completions" else {"prompt": "a", "model": "scripted", "stream": True}
        response = ask(refusing(Overloaded("full", "wait", 2.2)), "POST", path, json=body)
        assert error_of(response, 503)["code"] == "overloaded" and response.headers["retry-after"] == "3"

    @pytest.mark.parametrize(
        ("error", "status"), [(DeadlineExceeded("late", "ask for less"), 504), (EngineFailed("broken"), 502)]
    )
    def test_a_failure_has_its_status_and_in_a_stream_its_event(self, error, status):
        shape = error_of(ask(failing(error), "POST", "/generate", json={"prompt": "a"}), status)
        streamed = ask(failing(error), "POST", "/generate/stream", json={"prompt": "a"})
        assert streamed.status_code == 200 and events(streamed.text)[-1] == ("error", {"error": shape})

    def test_what_nobody_expected_is_a_500_with_the_id_and_is_logged(self, caplog):
        headers = {"X-Request-ID": "the-id"}
        response = ask(
            refusing(RuntimeError("inner words")), "POST", "/generate", json={"prompt": "a"}, headers=headers
        )
        error = error_of(response, 500)
        assert "the-id" in error["message"] and "inner words" not in response.text
        assert "the-id" in caplog.text and "inner words" in caplog.text

    def test_a_deadline_of_the_service_reaches_the_engine(self):
        engine = ScriptedEngine(at_once)
        app = create_app(ServeConfig(request_seconds=7), engine)
        ask(app, "POST", "/generate", json={"prompt": "a"})
        ask(app, "POST", "/generate", json={"prompt": "a", "deadline_seconds": 2})
        assert [request.deadline_seconds for request in engine.requests] == [7, 2]

    def test_without_a_parent_it_cannot_answer(self):
        error = error_of(
            ask(create_app(ServeConfig(), ScriptedEngine()), "POST", "/generate", json={"prompt": "a", "parent": True}),
            400,
        )
        assert error["param"] == "parent"

    def test_a_model_s_path_is_not_told(self):
        engine = ScriptedEngine()
        engine.facts = engine.facts.__class__(**{**engine.facts.__dict__, "model": "/home/somebody/checkpoint"})
        assert "somebody" not in ask(create_app(ServeConfig(), engine), "GET", "/health").text


@pytest.fixture
def jobs_app(tmp_path):
    with open_jobs(tmp_path / "jobs") as service:
        yield create_app(ServeConfig(), ScriptedEngine(), service), service


GENERATE = {"kind": "generate", "config": {"generate": {"model": "tiny", "prompts": ["Once"], "max_new_tokens": 4}}}


class TestJobs:
    def test_a_job_is_submitted_listed_shown_and_cancelled(self, jobs_app):
        app, _ = jobs_app
        response = ask(app, "POST", "/jobs/submit", json=GENERATE)
        assert response.status_code == 202, response.text
        job = response.json()
        assert job["state"] == "queued" and job["kind"] == "generate" and job["config"] == GENERATE["config"]
        listed = ask(app, "GET", "/jobs").json()
        assert [entry["id"] for entry in listed["jobs"]] == [job["id"]] and "generate" in listed["kinds"]
        assert ask(app, "GET", f"/jobs/{job['id']}").json()["outcomes"] == {}
        assert ask(app, "POST", f"/jobs/{job['id']}/cancel").json()["state"] == "cancelled"
        assert 'hilda_jobs{state="cancelled"} 1.0' in ask(app, "GET", "/metrics").text

    def test_metrics_count_all_jobs_and_not_the_newest_alone(self, jobs_app, monkeypatch):
        app, service = jobs_app
        monkeypatch.setattr(service, "counts", lambda: {"queued": 2, "succeeded": 5000})
        text = ask(app, "GET", "/metrics").text
        assert 'hilda_jobs{state="queued"} 2.0' in text and 'hilda_jobs{state="succeeded"} 5000.0' in text

    def test_pages_of_the_list_follow_each_other(self, jobs_app):
        app, _ = jobs_app
        made = [ask(app, "POST", "/jobs/submit", json=GENERATE).json()["id"] for _ in range(3)]
        first = ask(app, "GET", "/jobs?limit=2").json()
        assert [job["id"] for job in first["jobs"]] == made[:0:-1] and first["next"] == made[1]
        second = ask(app, "GET", f"/jobs?limit=2&before={first['next']}").json()
        assert [job["id"] for job in second["jobs"]] == made[:1] and second["next"] is None
        assert ask(app, "GET", "/jobs?state=running").json()["jobs"] == []

    def test_events_go_on_after_the_last_one_seen_and_end_with_the_job(self, jobs_app):
        app, _ = jobs_app
        name = ask(app, "POST", "/jobs/submit", json=GENERATE).json()["id"]
        some = ask(app, "GET", f"/jobs/{name}/events?follow=false")
        assert some.headers["content-type"].startswith("text/event-stream")
        seen = re.findall(r"^id: (\d+)$", some.text, re.MULTILINE)
        assert events(some.text)[-1] == ("end", {"state": "queued", "over": False}) and seen
        ask(app, "POST", f"/jobs/{name}/cancel")
        rest = ask(app, "GET", f"/jobs/{name}/events", headers={"Last-Event-ID": seen[-1]}).text
        assert events(rest)[-1] == ("end", {"state": "cancelled", "over": True})
        assert not set(seen) & set(re.findall(r"^id: (\d+)$", rest, re.MULTILINE))

    def test_artefacts_are_files_of_the_job_s_folder_alone(self, jobs_app, tmp_path):
        app, service = jobs_app
        name = ask(app, "POST", "/jobs/submit", json=GENERATE).json()["id"]
        folder = service.get(name).folder
        (folder / "out").mkdir()
        (folder / "out" / "page.html").write_text("<script>1</script>")
        (tmp_path / "secret.txt").write_text("secret")
        (folder / "leak.txt").symlink_to(tmp_path / "secret.txt")
        listed = [artefact["path"] for artefact in ask(app, "GET", f"/jobs/{name}/artefacts").json()["artefacts"]]
        assert "out/page.html" in listed and "leak.txt" not in listed
        got = ask(app, "GET", f"/jobs/{name}/artefacts/out/page.html")
        assert got.text == "<script>1</script>" and got.headers["content-disposition"].startswith("attachment")
        assert "sandbox" in got.headers["content-security-policy"]
        for trick in (
            "../secret.txt ../../secret.txt %2e%2e/secret.txt ..%2f..%2fsecret.txt leak.txt /etc/passwd //etc/passwd "
            "out/../../x out ..%5csecret.txt %00 out%2f%00 C:%5cx " + "a" * 3000
        ).split():
            response = ask(app, "GET", f"/jobs/{name}/artefacts/{trick}")
            assert error_of(response, 404)

    def test_bad_submissions_and_unknown_jobs_are_told(self, jobs_app):
        app, _ = jobs_app
        for body, said in (
            ({"kind": "generat", "config": {}}, "did you mean 'generate'"),
            ({"kind": "generate"}, "config: it is missing, give a JSON object"),
            ({"kind": "generate", "config": []}, "config: [] is no JSON object"),
            ({"kind": "generate", "config": {"generate": {"modl": "tiny"}}}, "unknown key"),
            ({"kind": "generate", "config": {}, "now": True}, "unknown field"),
        ):
            assert said in error_of(ask(app, "POST", "/jobs/submit", json=body), 400)["message"]
        for path in ("", "/events", "/log", "/artefacts", "/artefacts/x"):
            assert error_of(ask(app, "GET", f"/jobs/nothing{path}"), 404)["code"] == "unknown_job"
        assert error_of(ask(app, "POST", "/jobs/nothing/cancel"), 404)
        assert error_of(ask(app, "GET", "/jobs?limit=0"), 400)["param"] == "limit"
        assert error_of(ask(app, "GET", "/jobs?state=tired"), 400)["param"] == "state"
        assert error_of(ask(app, "GET", "/jobs?before=nothing"), 404)

    def test_a_service_without_jobs_says_so(self):
        app = create_app(ServeConfig(), ScriptedEngine())
        assert error_of(ask(app, "GET", "/jobs"), 404)["code"] == "no_jobs"
        assert error_of(ask(app, "POST", "/jobs/submit", json=GENERATE), 404)
