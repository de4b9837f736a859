"""The load generator: what it sends is what it says, and what it counts is what happened."""

import json
import time

import pytest

pytest.importorskip("fastapi")

from hildanext.bench.serve_load import CANCELLED, Outcome, ServeLoadKnobs, measure, plans, summary, tables
from hildanext.cli import main
from hildanext.config import build
from hildanext.engines.base import Answer
from hildanext.engines.transformers import TransformersKnobs
from hildanext.errors import ConfigError, ModelError
from hildanext.inference import DecodeStats
from hildanext.serve.settings import ServeKnobs
from misbehaving import chunk, misbehaving, tells
from serving import live


@pytest.fixture(scope="module")
def address():
    inside = TransformersKnobs(threads=1, dtype="fp32").open("tiny", "tiny", "for a test")
    with live(ServeKnobs(port=0, jobs_folder=None), inside) as found:
        yield found


def load(url, parent=None, **settings):
    return measure(url, build(ServeLoadKnobs, {"warmup": 0, "max_new_tokens": 12, **settings}, "bench"), None, parent)


def test_the_same_seed_is_the_same_load_and_another_is_another():
    settings = {"requests": 50, "rate": 4.0, "cancel_rate": 0.5}
    one, two, other = (list(plans(ServeLoadKnobs(seed=seed, **settings))) for seed in (1, 1, 2))
    assert one == two != other and len({plan.prompt for plan in one}) == 52


def test_arrivals_are_poisson_and_as_many_leave_as_asked():
    found = list(plans(ServeLoadKnobs(requests=4000, warmup=0, rate=5.0, cancel_rate=0.25, cancel_seconds=2.0)))
    gaps = [after.arrival - before.arrival for before, after in zip(found, found[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(0.2, rel=0.05) and spread == pytest.approx(mean, rel=0.07)
    leaving = [plan.leaves for plan in found if plan.leaves is not None]
    assert len(leaving) / 4000 == pytest.approx(0.25, abs=0.03) and 0 <= min(leaving) <= max(leaving) <= 2.0


def test_prompts_have_as_many_words_as_asked_and_begin_alike():
    found = [plan.prompt.split() for plan in plans(ServeLoadKnobs(requests=200, prompt_words=(3, 5), shared_words=4))]
    assert {len(words) for words in found} == {7, 8, 9} and len({tuple(words[:4]) for words in found}) == 1


def test_a_closed_loop_never_has_more_open_than_clients():
    now, most = [0], [0]

    def act(handler, body):
        now[0] += 1
        most[0] = max(most[0], now[0])
        time.sleep(0.03)
        now[0] -= 1
        tells(handler, body)

    with misbehaving(act) as server:
        found = load(server.url, clients=3, requests=9)["results"]["model"]
        assert most[0] == 3 and len(server.asked) == 9
    assert found["answered"] == 9 and found["tokens"] == 27 and found["tokens_per_forward"] is None
    assert found["latency_seconds"]["p50"] >= 0.03


def test_an_open_loop_does_not_wait_and_counts_from_the_arrival():
    def act(handler, body):
        time.sleep(0.3)
        tells(handler, body)

    with misbehaving(act) as server:
        begun = time.perf_counter()
        found = load(server.url, rate=200.0, requests=20)["results"]["model"]
        assert time.perf_counter() - begun < 3.0  # one after the other they take 6 s
        crowded = load(server.url, rate=500.0, requests=10, most_open=2)["results"]["model"]
    assert found["answered"] == 20 and found["latency_seconds"]["p50"] >= 0.3
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
        found = load(server.url, clients=1, requests=8)["results"]["model"]
    assert found["errors"] == {"Overloaded": 2, "EngineFailed": 2} and found["answered"] == 4
    assert "full" in found["error_examples"]["Overloaded"]


def test_a_client_that_leaves_closes_its_connection():
    def act(handler, body):
        handler.begin()
        for _ in range(500):
            handler.say(chunk("x"))
            time.sleep(0.01)

    with misbehaving(act) as server:
        found = load(server.url, requests=1, cancel_rate=1.0, cancel_seconds=0.2)["results"]["model"]
        assert found["errors"] == {CANCELLED: 1} and server.gone.wait(5)
    assert found["latency_seconds"] is None and "not told" in str(tables_text({"model": found}, server.url))


def tables_text(results, url):
    filled = {role: {"engine_counts": {}, "name": "m", **one} for role, one in results.items()}
    settings = {"clients": 1, "rate": None, "requests": 1, "max_new_tokens": 1}
    (table,) = tables({"results": filled, "url": url, "loop": "closed", "settings": settings})
    return [list(column.cells) for column in table.columns]


def test_percentiles_and_rates_are_those_of_the_answers():
    def outcome(seconds):
        stats = DecodeStats(1, 3, 0, 0, 10, 0, seconds, 0.0)
        answer = Answer("x", [1] * 10, "length", 5, 1, stats, 0.0, seconds / 2, seconds)
        return Outcome(answer, {"completion_tokens_details": {"forward_passes": 4, "denoising_steps": 3}})

    found = summary([outcome(float(second)) for second in range(1, 102)] + [Outcome(None, {}, "x", "y")], 10.0)
    assert found["latency_seconds"] == {"mean": 51.0, "p50": 51.0, "p90": 91.0, "p99": 100.0, "max": 101.0}
    assert found["first_block_seconds"]["p50"] == 25.5 and found["tokens_per_second"] == 101.0
    assert found["tokens_per_forward"] == 2.5 and found["requests"] == 102 and found["errors"] == {"x": 1}


def test_our_own_service_tells_forwards_and_the_parent_stands_beside(address):
    found = load(address, "auto", clients=2, requests=4, ignore_eos=True, deadline_seconds=60)
    model, parent = found["results"]["model"], found["results"]["parent"]
    assert model["name"] == "tiny" and parent["name"] == "tiny-parent" and found["server"]["device"] == "cpu"
    assert model["answered"] == parent["answered"] == 4 and model["tokens"] == parent["tokens"] == 48
    assert model["engine_counts"]["generated_tokens"] == 48 and parent["tokens_per_forward"] == 1.0
    assert model["tokens_per_forward"] == 48 / model["forwards"]
    assert model["engine_counts"]["denoising_steps"] == model["denoising_steps"]


def test_deadlines_end_as_deadlines(address):
    found = load(address, requests=3, deadline_seconds=0.001)["results"]["model"]
    assert found["errors"] == {"DeadlineExceeded": 3} and found["answered"] == 0


def test_wishes_that_only_our_service_knows_are_refused_elsewhere():
    with misbehaving(tells) as server:
        with pytest.raises(ConfigError, match="not a HILDA server"):
            load(server.url, ignore_eos=True)
        with pytest.raises(ModelError, match="has no model 'x'"):
            measure(server.url, ServeLoadKnobs(), "x")
        with pytest.raises(ConfigError, match="fewest and the most"):
            ServeLoadKnobs(prompt_words=(5, 2))


class TestTheCommand:
    def test_it_prints_a_table_and_then_one_line_of_json(self, address, capsys, tmp_path):
        out = tmp_path / "load.json"
        flags = ["--clients", "2", "--requests", "3", "--new-tokens", "8", "--seed", "1", "--out", str(out)]
        assert main(["bench", "serve", "--url", address, *flags]) == 0
        printed = capsys.readouterr().out
        result = json.loads(printed.strip().splitlines()[-1])
        assert result["results"]["model"]["answered"] == 3 and result == json.loads(out.read_text())
        assert "first block p50, s" in printed and "closed loop, 2 clients" in printed

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (["serve"], "no service was named"),
            (["serve", "--url", "http://127.0.0.1:9"], "no server answers"),
            (["serve", "--url", "nonsense"], "no address"),
            (["serve", "--url", "http://127.0.0.1:9", "--clients", "0"], "clients"),
            (["decode", "--rate", "3"], "--rate is about a running service"),
        ],
    )
    def test_its_faults_are_one_line(self, flags, words, capsys):
        assert main(["bench", *flags]) == 2
        said = capsys.readouterr().err
        assert words in said and len(said.splitlines()) == 1
