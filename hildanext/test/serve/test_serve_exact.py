"""Exact mode over the wire: the parent's own text at every route, and what is told of how it came about."""

import json
from collections.abc import Iterator

import pytest

from exact_stubs import tiny_drafts
from hildanext.api import create_app
from hildanext.data.chat_template import set_template
from hildanext.engine.local import LocalEngine, LocalEngineConfig
from hildanext.serve.settings import ServeConfig
from serving import ask, events

PROMPT = {"prompt": "Once upon a time", "max_new_tokens": 24}
EXACT = {"mode": "exact", "decoder": {"after": "all"}}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("exact")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HILDANEXT_HOME", str(folder / "home"))
        yield str(tiny_drafts(folder / "drafts"))


def app_of(engine) -> object:
    return create_app(ServeConfig(jobs_folder=None), engine)


@pytest.fixture(scope="module")
def both(home) -> Iterator[object]:
    """The embedded pair, with drafts of its parent."""
    engine = LocalEngineConfig(adapters=home, dtype="fp32", threads=1).open("tiny", "tiny", "for a test")
    assert isinstance(engine, LocalEngine)
    set_template(engine.tokenizer, "auto")
    yield app_of(engine)
    engine.close()


@pytest.fixture(scope="module")
def alone(home) -> Iterator[object]:
    """The drafts alone."""
    engine = LocalEngineConfig(dtype="fp32", threads=1).open(home, None, "for a test")
    yield app_of(engine)
    engine.close()


def test_every_route_writes_the_parents_text(both) -> None:
    parent = ask(both, "POST", "/generate", json={**PROMPT, "parent": True}).json()
    exact = ask(both, "POST", "/generate", json={**PROMPT, **EXACT, "frames": True}).json()
    assert exact["text"] == parent["text"] and exact["tokens"] == parent["tokens"]
    usage = exact["usage"]
    assert usage["drafted_tokens"] > usage["confirmed_tokens"] >= 0 == parent["usage"]["drafted_tokens"]
    assert usage["fed_rows"] > usage["denoising_steps"] and usage["edited_tokens"] > 0
    assert {frame["kind"] for frame in exact["frames"]} == {"exact"}
    assert sum(len(frame["edits"]) for frame in exact["frames"]) == usage["edited_tokens"]
    body = {"model": "tiny", "prompt": PROMPT["prompt"], "max_tokens": 24, **EXACT}
    completion = ask(both, "POST", "/v1/completions", json={**body, "logprobs": 1}).json()
    assert completion["choices"][0]["text"] == parent["text"]
    details = completion["usage"]["completion_tokens_details"]
    assert details["drafted_tokens"] == usage["drafted_tokens"] and details["tokens_per_forward"] >= 1.0
    theirs = ask(both, "POST", "/v1/completions", json={**body, "model": "tiny-parent", "mode": None, "decoder": None,
                                                       "logprobs": 1}).json()  # fmt: skip
    ours = completion["choices"][0]["logprobs"]
    assert ours["tokens"] == theirs["choices"][0]["logprobs"]["tokens"]
    assert ours["token_logprobs"] == pytest.approx(theirs["choices"][0]["logprobs"]["token_logprobs"], abs=2e-4)
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    said = [
        ask(both, "POST", "/v1/chat/completions", json={**chat, **more}) for more in (EXACT, {"model": "tiny-parent"})
    ]
    assert said[0].json()["choices"][0]["message"] == said[1].json()["choices"][0]["message"]


def test_what_is_streamed_is_final_and_joins_to_the_text(both) -> None:
    told = events(ask(both, "POST", "/generate/stream", json={**PROMPT, **EXACT}).text)
    assert [name for name, _ in told][0] == "start" and told[-1][0] == "done"
    done = told[-1][1]
    assert "".join(data["text"] for name, data in told if name == "block") == done["text"]
    assert {name for name, _ in told[1:-1]} == {"frame", "block"}
    body = {"model": "tiny", "prompt": PROMPT["prompt"], "stream": True, "max_tokens": 24, "n": 2, **EXACT}
    chunks = events(ask(both, "POST", "/v1/completions", json={**body, "stream_denoising": True}).text)
    pictures = [data["diffusion"] for _, data in chunks if isinstance(data, dict) and "diffusion" in data]
    assert pictures and {picture["kind"] for picture in pictures} == {"exact"}
    assert pictures[-1]["tokens"][-1]["state"] in ("draft", "edited")


def test_seeds_stops_and_limits_are_those_of_the_parent(both) -> None:
    sampling = {"temperature": 1.0, "seed": 5, "stop": ["."], "max_new_tokens": 40, "prompt": "One day"}
    parent = ask(both, "POST", "/generate", json={**sampling, "parent": True}).json()
    exact = ask(both, "POST", "/generate", json={**sampling, **EXACT}).json()
    assert (exact["text"], exact["tokens"], exact["finish_reason"]) == (
        parent["text"], parent["tokens"], parent["finish_reason"]
    )  # fmt: skip


def test_an_echo_in_exact_mode_has_the_parents_likelihoods(both) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 4, "echo": True, "logprobs": 1}
    exact = ask(both, "POST", "/v1/completions", json={"model": "tiny", **body, "mode": "exact"}).json()
    parent = ask(both, "POST", "/v1/completions", json={"model": "tiny-parent", **body}).json()
    assert exact["choices"] == parent["choices"]


def test_health_models_and_metrics_tell_of_drafts(both, alone) -> None:
    health = ask(both, "GET", "/health").json()
    assert list(health["modes"]) == ["S_MODE", "Q_MODE", "exact"] and health["engine"]["drafts"] == 3
    assert "exact" in health["decoders"] and health["load"]["draft_tokens"] > 0
    metrics = ask(both, "GET", "/metrics").text
    for name in ("drafts", "draft_tokens", "accepted_tokens"):
        assert f"hilda_spec_decode_num_{name}_total" in metrics
    assert 'hilda_spec_decode_num_accepted_tokens_per_pos_total{position="0"}' in metrics
    assert 'hilda_tokens_per_forward_count{by="exact"}' in metrics
    assert list(ask(alone, "GET", "/health").json()["modes"]) == ["exact"]
    kinds = {card["id"]: card["kind"] for card in ask(alone, "GET", "/v1/models").json()["data"]}
    assert kinds == {"drafts": "drafts", "tiny": "autoregressive"}


def test_drafts_alone_write_in_exact_mode_where_nothing_is_said(alone) -> None:
    parent = ask(alone, "POST", "/generate", json={**PROMPT, "parent": True}).json()
    exact = ask(alone, "POST", "/generate", json=PROMPT).json()
    assert exact["text"] == parent["text"] and exact["decoder"]["name"] == "exact"
    for body in ({"mode": "S_MODE"}, {"decoder": {"name": "threshold_edit"}}):
        refused = ask(alone, "POST", "/generate", json={**PROMPT, **body})
        assert refused.status_code == 400 and "not offered here: there is exact" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"decoder": {"drafts": 4}}, "drafts 4, and the adapters have learnt 3: ask for 1 to 3 drafts"),
        ({"decoder": {"drafter": "someone"}}, "'someone' is no choice"),
        ({"decoder": {"tau_mask": 0.3}}, "unknown key 'tau_mask'"),
        ({"effort": "low"}, "efforts lie over the modes of a diffusion model"),
        ({"decoder": {"sample_drafts": True}}, "sample_drafts at temperature 0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_exact_mode_is_one_line(both, body: dict, message: str) -> None:
    refused = ask(both, "POST", "/generate", json={**PROMPT, "mode": "exact", **body})
    assert refused.status_code == 400, json.dumps(refused.json())
    assert message in refused.json()["error"]["message"]


def test_exact_mode_is_refused_where_there_is_no_parent() -> None:
    engine = LocalEngineConfig(dtype="fp32", threads=1).open("tiny", None, "for a test")
    assert isinstance(engine, LocalEngine)
    try:
        refused = ask(app_of(engine), "POST", "/generate", json={**PROMPT, "mode": "exact"})
        assert refused.status_code == 400 and "mode exact is not offered here" in refused.json()["error"]["message"]
    finally:
        engine.close()
