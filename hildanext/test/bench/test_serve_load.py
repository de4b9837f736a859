"""The load generator: what it sends is what it says, and what it counts is what happened."""

import json
import tempfile
import time

import httpx
import pytest

pytest.importorskip("fastapi")

from hildanext.bench import serve_figure
from hildanext.bench.own_server import ServerFailed, own_server
from hildanext.bench.serve_load import CANCELLED, Outcome, ServeLoadConfig, measure, plans, summary, tables
from hildanext.cli import main
from hildanext.core.config import validate
from hildanext.core.errors import ConfigError, ModelError
from hildanext.data.generation_result import GenerationStats
from hildanext.engine.base import RequestOutput
from hildanext.engine.local import LocalEngineConfig
from hildanext.serve.settings import ServeConfig
from misbehaving import chunk, misbehaving, tells
from serving import live


@pytest.fixture(scope="module")
def address():
    inside = LocalEngineConfig(threads=1, dtype="fp32").open("tiny", "tiny", "for a test")
    with live(ServeConfig(port=0, jobs_folder=None), inside) as url:
        yield url


def load(url, parent=None, **settings):
    knobs = validate(ServeLoadConfig, {"warmup": 0, "max_new_tokens": 12, **settings}, "bench")
    result = measure(url, [knobs], None, parent)
    return {**result, **result["loads"][0]}


def test_the_same_seed_is_the_same_load_and_another_is_another():
    settings = {"requests": 50, "rate": 4.0, "cancel_rate": 0.5}
    one, two, other = (list(plans(ServeLoadConfig(seed=seed, **settings))) for seed in (1, 1, 2))
    assert one == two != other and len({plan.prompt.text for plan in one}) == 52


def test_arrivals_are_poisson_and_as_many_leave_as_asked():
    schedule = list(plans(ServeLoadConfig(requests=4000, warmup=0, rate=5.0, cancel_rate=0.25, cancel_seconds=2.0)))
    gaps = [after.arrival - before.arrival for before, after in zip(schedule, schedule[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(0.2, rel=0.05) and spread == pytest.approx(mean, rel=0.07)
    leaving = [plan.leaves for plan in schedule if plan.leaves is not None]
    assert len(leaving) / 4000 == pytest.approx(0.25, abs=0.03) and 0 <= min(leaving) <= max(leaving) <= 2.0


def test_prompts_have_as_many_words_as_asked_and_begin_alike():
    prompts = [
        plan.prompt.text.split() for plan in plans(ServeLoadConfig(requests=200, prompt_words=(3, 5), shared_words=4))
    ]
    assert {len(words) for words in prompts} == {7, 8, 9} and len({tuple(words[:4]) for words in prompts}) == 1


def test_a_closed_loop_never_has_more_open_than_clients():
    now, most = [0], [0]

    def act(handler, body):
        now[0] += 1
        most[0] = max(most[0], now[0])
        time.sleep(0.03)
        now[0] -= 1
        tells(handler, body)

    with misbehaving(act) as server:
        measured = load(server.url, clients=3, requests=9)["results"]["model"]
        assert most[0] == 3 and len(server.asked) == 9
    assert measured["answered"] == 9 and measured["tokens"] == 27 and measured["tokens_per_forward"] is None
    assert measured["latency_seconds"]["p50"] >= 0.03


def test_an_open_loop_does_not_wait_and_counts_from_the_arrival():
    def act(handler, body):
        time.sleep(0.3)
        tells(handler, body)

    with misbehaving(act) as server:
        begun = time.perf_counter()
        measured = load(server.url, rate=200.0, requests=20)["results"]["model"]
        assert time.perf_counter() - begun < 3.0  # one after the other they take 6 s
        crowded = load(server.url, rate=500.0, requests=10, most_open=2)["results"]["model"]
    assert measured["answered"] == 20 and measured["latency_seconds"]["p50"] >= 0.3
    assert crowded["errors"]["not sent"] + crowded["answered"] == 10 and crowded["errors"]["not sent"] > 0


def test_faults_are_counted_by_kind_and_whole_answers_alone_are_timed():
    def act(handler, body):
        kind = len(server.asked) % 4
        if kind == 0:
            handler.whole(503, {"error": {"message": "full"}})
        elif kind == 1:
            handler.begin()
            handler.say(chunk("x"))
        else:
            tells(handler, body)

    with misbehaving(act) as server:
        measured = load(server.url, clients=1, requests=8)["results"]["model"]
    assert measured["errors"] == {"Overloaded": 2, "EngineFailed": 2} and measured["answered"] == 4
    assert "full" in measured["error_examples"]["Overloaded"]


def test_a_client_that_leaves_closes_its_connection():
    def act(handler, body):
        handler.begin()
        for _ in range(500):
            handler.say(chunk("x"))
            time.sleep(0.01)

    with misbehaving(act) as server:
        measured = load(server.url, requests=1, cancel_rate=1.0, cancel_seconds=0.2)["results"]["model"]
        assert measured["errors"] == {CANCELLED: 1} and server.gone.wait(5)
    assert measured["latency_seconds"] is None and "not told" in str(tables_text({"model": measured}, server.url))


def tables_text(results, url):
    filled = {role: {"engine_counts": {}, "name": "m", **measured} for role, measured in results.items()}
    settings = {"clients": 1, "rate": None, "requests": 1, "max_new_tokens": 1}
    (table,) = tables({"url": url, "loads": [{"results": filled, "loop": "closed", "settings": settings}]})
    return [list(column.cells) for column in table.columns]


def test_percentiles_and_rates_are_those_of_the_answers():
    def outcome(seconds):
        stats = GenerationStats(prefill_forwards=1, denoise_forwards=3, tokens=10, seconds=seconds)
        times = {"queue_seconds": 0.0, "first_piece_seconds": seconds / 2, "seconds": seconds}
        answer = RequestOutput([1] * 10, "x", "length", stats, prompt_tokens=5, cached_tokens=1, **times)
        return Outcome(answer, {"completion_tokens_details": {"forward_passes": 4, "denoising_steps": 3}})

    measured = summary([outcome(float(second)) for second in range(1, 102)] + [Outcome(None, {}, "x", "y")], 10.0)
    assert measured["latency_seconds"] == {"mean": 51.0, "p50": 51.0, "p90": 91.0, "p99": 100.0, "max": 101.0}
    assert measured["first_block_seconds"]["p50"] == 25.5 and measured["tokens_per_second"] == 101.0
    assert measured["tokens_per_forward"] == 2.5 and measured["requests"] == 102 and measured["errors"] == {"x": 1}


def test_our_own_service_tells_forwards_and_the_parent_stands_beside(address):
    result = load(address, "auto", clients=2, requests=4, ignore_eos=True, deadline_seconds=60)
    model, parent = result["results"]["model"], result["results"]["parent"]
    assert model["name"] == "tiny" and parent["name"] == "tiny-parent" and result["server"]["device"] == "cpu"
    assert model["answered"] == parent["answered"] == 4 and model["tokens"] == parent["tokens"] == 48
    assert model["engine_counts"]["generated_tokens"] == 48 and parent["tokens_per_forward"] == 1.0
    assert model["tokens_per_forward"] == 48 / model["forwards"]
    assert model["engine_counts"]["denoising_steps"] == model["denoising_steps"]


def test_deadlines_end_as_deadlines(address):
    measured = load(address, requests=3, deadline_seconds=0.001)["results"]["model"]
    assert measured["errors"] == {"DeadlineExceeded": 3} and measured["answered"] == 0


def test_wishes_that_only_our_service_knows_are_refused_elsewhere():
    with misbehaving(tells) as server:
        with pytest.raises(ConfigError, match="not a HILDA server"):
            load(server.url, ignore_eos=True)
        with pytest.raises(ModelError, match="has no model 'x'"):
            measure(server.url, [ServeLoadConfig()], "x")
        with pytest.raises(ConfigError, match="fewest and the most"):
            ServeLoadConfig(prompt_words=(5, 2))


class TestOwnServer:
    def test_its_output_is_the_startup_line_alone_its_log_is_json_and_it_ends_with_its_block(
        self, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        settings = {"model": "tiny", "engine": {"name": "auto", "threads": 1}}
        with pytest.raises(ZeroDivisionError), own_server(settings) as url:
            assert httpx.get(url + "/v1/models").json()["data"][0]["id"] == "tiny"
            assert httpx.get(url + "/nothing").status_code == 404
            (folder,) = tmp_path.iterdir()
            until = time.monotonic() + 30
            while (logged := (folder / "err").read_text()).count("\n") < 2:  # a line follows its answer
                assert time.monotonic() < until, logged
            lines = (folder / "out").read_text().splitlines()
            raise ZeroDivisionError
        assert len(lines) == 1 and lines[0].startswith(f"{url} serves tiny with transformers")
        requests = [json.loads(line) for line in logged.splitlines()]
        assert [(line["path"], line["status"]) for line in requests] == [("/v1/models", 200), ("/nothing", 404)]
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)

    def test_one_that_is_never_ready_is_given_up_in_time(self):
        with pytest.raises(ServerFailed, match="not ready after 0.1 s"), own_server({"model": "tiny"}, patience=0.1):
            pass


class TestPicture:
    def one(self, loop, pace, answered=3):
        times = {"p50": 0.1 * pace, "p90": 0.2 * pace, "p99": 0.3 * pace} if answered else None
        waits = {"first_block_seconds": times, "latency_seconds": times}
        role = {"name": "m", "answered": answered, "tokens_per_second": 10.0, **waits}
        settings = {"clients": pace, "rate": pace, "requests": 3, "max_new_tokens": 8}
        return {"loop": loop, "settings": settings, "results": {"model": role, "parent": role}}

    def test_it_has_a_column_for_each_loop_and_a_line_for_each_percentile(self):
        loads = [self.one("closed", 2), self.one("closed", 1), self.one("open", 4, answered=0), self.one("open", 3)]
        axes = serve_figure._figure({"loads": loads}, ["closed", "open"]).axes
        assert len(axes) == 6 and [len(panel.get_lines()) for panel in axes] == [6, 6, 6, 6, 2, 2]
        first = axes[0].get_lines()[0]
        assert list(first.get_xdata()) == [1, 2] and list(first.get_ydata()) == [0.1, 0.2]
        assert list(axes[1].get_lines()[0].get_xdata()) == [3]
        assert first.get_label() == "m, p50" and axes[0].get_lines()[5].get_label() == "m (AR parent), p99"

    def test_where_nothing_was_answered_there_is_none(self, tmp_path):
        path = tmp_path / "x.png"
        assert serve_figure.draw({"loads": [self.one("closed", 2, answered=0)]}, path) is None and not path.exists()


class TestTheCommand:
    def test_it_prints_a_table_and_then_one_line_of_json(self, address, capsys, tmp_path):
        out = tmp_path / "load.json"
        flags = ["--clients", "2", "--requests", "3", "--new-tokens", "8", "--seed", "1", "--out", str(out)]
        assert main(["bench", "serve", "--url", address, *flags]) == 0
        printed = capsys.readouterr().out
        result = json.loads(printed.strip().splitlines()[-1])
        assert result["loads"][0]["results"]["model"]["answered"] == 3 and result == json.loads(out.read_text())
        assert "first block p50, s" in printed and "closed loop, 2 clients" in printed
        assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    def test_each_number_of_clients_and_each_rate_is_a_load_with_prompts_of_its_own(self, capsys):
        with misbehaving(tells) as server:
            words = ["--clients", "1,2", "--rate", "50,100", "--requests", "3"]
            assert main(["bench", "serve", "--url", server.url, *words]) == 0
            assert len({body["prompt"] for _, body, _ in server.asked}) == 4 * (3 + 2)
        result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
        paces = [(load["loop"], load["settings"]["clients"], load["settings"]["rate"]) for load in result["loads"]]
        assert paces == [("closed", 1, None), ("closed", 2, None), ("open", 4, 50.0), ("open", 4, 100.0)]

    def test_a_file_s_prompts_are_asked_in_turn_and_conversations_as_such(self, capsys, tmp_path):
        path = tmp_path / "prompts.jsonl"
        path.write_text('"one"\n{"messages": [{"role": "user", "content": "two"}]}\n')
        words = ["--prompts", str(path), "--clients", "1", "--requests", "3", "--set", "bench.warmup=0"]
        with misbehaving(tells) as server:
            main(["bench", "serve", "--url", server.url, *words])
            asked = [(path, body.get("prompt"), body.get("messages")) for path, body, _ in server.asked]
        chat = ("/v1/chat/completions", None, [{"role": "user", "content": "two"}])
        assert asked == [("/v1/completions", "one", None), chat, ("/v1/completions", "one", None)]

    def test_without_an_address_it_starts_a_server_and_stops_it(self, capsys):
        words = ["--parent", "tiny", "--threads", "1", "--requests", "2", "--new-tokens", "8"]
        assert main(["bench", "serve", *words]) == 0
        said = capsys.readouterr()
        result = json.loads(said.out.strip().splitlines()[-1])
        results = result["loads"][0]["results"]
        assert results["model"]["answered"] == results["parent"]["answered"] == 2
        assert results["parent"]["name"] == "tiny-parent" and result["server"]["threads"] == 1
        assert f"{result['url']} serves tiny beside its parent tiny-parent" in said.err
        with pytest.raises(httpx.ConnectError):
            httpx.get(result["url"])

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (["serve", "--model", "no-such-folder"], "no-such-folder"),
            (["serve", "--parent", "auto"], "what a running service tells"),
            (["serve", "--api-key-env", "X"], "about a running service"),
            (["serve", "--clients", "1,two"], "no list of numbers"),
            (["serve", "--prompts", "nowhere.txt"], "cannot read the prompts"),
            (["serve", "--url", "http://127.0.0.1:9"], "no server answers"),
            (["serve", "--url", "nonsense"], "no address"),
            (["serve", "--url", "http://127.0.0.1:9", "--clients", "0"], "clients"),
            (["decode", "--rate", "3"], "--rate is about a service"),
        ],
    )
    def test_its_faults_are_one_line(self, flags, words, capsys):
        assert main(["bench", *flags]) == 2
        said = capsys.readouterr().err
        assert words in said and len(said.splitlines()) == 1
