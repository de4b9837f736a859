"""A decoder that nobody has written a line for, but its own: it is there on every way to ask for a text."""

import ast
import asyncio
import json
from dataclasses import fields as fields_of
from pathlib import Path
from types import NoneType
from typing import Literal, get_args, get_origin

import httpx
import pytest

import hildanext
from hildanext.api import create_app
from hildanext.cli import main
from hildanext.core.config import may_be_none
from hildanext.core.errors import ConfigError
from hildanext.core.knobs import knobs_in, knobs_of
from hildanext.core.registry import under_profile
from hildanext.decoding import DECODERS, decoder_section, make_decoder, methods
from hildanext.engine.local import LocalEngineConfig
from hildanext.eval.lm_harness import from_arguments
from hildanext.serve.requests import DECODING_ALIASES, GenerateBody
from hildanext.serve.settings import ServeConfig
from hildanext.stages.submission import check_submission
from toy_decoder import ASKED, Daring, Toy


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(DECODERS, "toy", Toy)
    monkeypatch.setitem(DECODERS, "daring", Daring)


@pytest.fixture(scope="module")
def engine():
    engine = LocalEngineConfig(threads=1).open("tiny", None, "for a test")
    yield engine
    engine.close(0.0)


def ask(engine, method: str, path: str, profile: str = "SAFE", **body):
    async def answer():
        transport = httpx.ASGITransport(create_app(ServeConfig(profile=profile), engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.request(method, path, json=body or None)

    return asyncio.run(answer())


SHORT = {"prompt": "Once upon", "max_tokens": 3}


def test_the_command_line_takes_it_by_name_and_by_knob(capsys):
    flags = ["--prompt", "Once upon", "--max-new-tokens", "3", "--json", "--threads", "1", "--device", "cpu"]
    assert (
        main(["generate", "--decoder", "toy", "--set", "decoder.alpha=0.3", "--set", "decoder.beta=off", *flags]) == 0
    )
    printed = json.loads(capsys.readouterr().out)
    assert printed["decoder"] == {**ASKED, "beta": None} and printed["mode"] == "toy" and len(printed["tokens"]) == 3
    for wrong, says in (
        (["--tau-mask", "0.5"], "unknown key 'tau_mask'"),
        (["--mode", "S_MODE"], "not of 'toy': leave them out"),
        (["--set", "decoder.alpha=2"], "alpha: 2 is above 1, give 0 to 1"),
        (["--set", "decoder.alpah=0.3"], "did you mean 'alpha'?"),
    ):
        assert main(["generate", "--decoder", "toy", *wrong, *flags]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_a_request_takes_it(engine, path):
    model = {} if path == "/generate" else {"model": "tiny"}
    answer = ask(engine, "POST", path, **SHORT, **model, decoder=ASKED)
    assert answer.status_code == 200, answer.text
    if path == "/generate":
        assert answer.json()["decoder"] == ASKED
    for wrong, says in (
        ({"decoder": {**ASKED, "alpha": 2}}, "alpha: 2 is above 1, give 0 to 1"),
        ({"decoder": {**ASKED, "alpha": "0.3"}}, "alpha: '0.3' is no number, give 0 to 1"),
        ({"decoder": {**ASKED, "alpah": 1}}, "did you mean 'alpha'?"),
        ({"decoder": {"name": "toi"}}, "did you mean 'toy'?"),
        ({"decoder": ASKED, "tau_mask": 0.5}, "unknown key 'tau_mask'"),
        ({"decoder": ASKED, "effort": "low"}, "leave them out"),
        ({"decoder": "toy"}, "decoder: 'toy' is no JSON object"),
        ({"decoder": {"name": ["toy"]}}, "decoder has no name"),
    ):
        answer = ask(engine, "POST", path, **SHORT, **model, **wrong)
        assert answer.status_code == 400 and says in answer.json()["error"]["message"], answer.text


def test_a_request_may_name_the_mode_s_own_decoder_too(engine):
    body = {**SHORT, "mode": "Q_MODE", "decoder": {"tau_edit": "off", "max_post": 2}, "max_post": 3}
    section = ask(engine, "POST", "/generate", **body).json()["decoder"]
    assert section == {"name": "threshold_edit", "tau_mask": 0.7, "tau_edit": None, "max_post": 3}


@pytest.mark.parametrize("beta", ["\ud800", "1", 1.5, [1], {}])
def test_strictness_takes_types_as_json_has_them(beta):
    with pytest.raises(ConfigError, match="decoder toy"):
        make_decoder({**ASKED, "beta": beta}, strict=True)


def test_the_harness_takes_it():
    parts = from_arguments(model="tiny", device="cpu", threads=1, decoder="toy", **{"decoder.alpha": 0.3})
    assert parts["writer"].settings["decoder"] == ASKED
    with pytest.raises(ConfigError, match="did you mean 'alpha'?"):
        from_arguments(decoder="toy", **{"decoder.alpah": 0.3})


def test_the_page_and_the_document_are_told_of_it(engine):
    schemas = ask(engine, "GET", "/health").json()["decoders"]
    assert (
        set(schemas) == set(methods())
        and schemas["toy"]["description"] == "Fill whatever is surer than alpha, and else everything."
    )
    alpha = {"default": 0.5, "description": "How sure.", "maximum": 1, "minimum": 0, "title": "Alpha", "type": "number"}
    assert schemas["toy"]["properties"]["alpha"] == alpha and schemas["toy"]["required"] == ["name"]
    body = ask(engine, "GET", "/openapi.json").json()["components"]["schemas"]["GenerateBody"]
    assert [choice.get("title") for choice in body["properties"]["decoder"]["anyOf"]] == [*methods(), None]
    assert {"tau_mask", "tau_edit", "window", "threshold"} <= set(body["properties"])


DARING = {"name": "daring"}


def test_every_door_refuses_a_research_decoder_unless_the_profile_is_FULL(engine, capsys, tmp_path):
    says, flags = "'daring' is a FULL method", ["--max-new-tokens", "3", "--json", "--threads", "1", "--device", "cpu"]
    assert main(["generate", "--decoder", "daring", *flags]) == 2 and says in capsys.readouterr().err
    assert main(["generate", "--decoder", "daring", "--set", "profile=FULL", *flags]) == 0
    capsys.readouterr()
    for arguments in (
        ["eval", "--tasks", "gsm8k", "--set", f"eval.quality.decoders.mine={json.dumps(DARING)}"],
        ["bench", "decode", "--set", f"bench.decoders.mine={json.dumps(DARING)}"],
    ):
        assert main(arguments) == 2 and says in capsys.readouterr().err
    refused = ask(engine, "POST", "/generate", **SHORT, decoder=DARING)
    assert refused.status_code == 400 and says in refused.json()["error"]["message"]
    assert ask(engine, "POST", "/generate", "FULL", **SHORT, decoder=DARING).status_code == 200
    assert ask(engine, "POST", "/generate", **SHORT, decoder=DARING).status_code == 400
    with pytest.raises(ConfigError, match=says):
        from_arguments(decoder="daring")
    run = {"folder": str(tmp_path), "stages": [{"stage": "generate", "model": "tiny", "decoder": DARING}]}
    with pytest.raises(ConfigError, match=f"generate: {says}"):
        check_submission(run)
    check_submission({**run, "profile": "FULL"})
    assert make_decoder(ASKED) == Toy(alpha=0.3)
    with under_profile("FULL") as research:
        make_decoder(DARING)
    assert research == {"daring"}
    with pytest.raises(ConfigError, match="decoder: 'daring' is a FULL method"):
        make_decoder(DARING)


def test_every_door_refuses_a_research_loss_unless_the_profile_is_FULL(capsys, tmp_path):
    says, losses = "'c2dlm' is a FULL method", [{"name": "m2t"}, {"name": "c2dlm"}]
    out = ["--out", str(tmp_path / "out")]
    for arguments in (
        ["convert", *out, "--set", "convert.parent=tiny", "--set", "convert.wsd=[]"],
        ["sft", *out, "--set", "sft.model=nowhere"],
        ["sft", *out, "--set", "sft.model=nowhere", "--data-only"],
    ):
        assert main([*arguments, "--set", f"{arguments[0]}.losses={json.dumps(losses)}"]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
    run = {"folder": str(tmp_path), "stages": [{"stage": "sft", "model": "nowhere", "losses": losses}]}
    with pytest.raises(ConfigError, match=f"sft: {says}"):
        check_submission(run)


def test_what_is_read_of_the_source_is_what_the_classes_have():
    family = knobs_in(Path(hildanext.__file__).parent / "decoding", "DECODERS")
    assert set(family) == set(DECODERS) - {"toy", "daring"}
    for name, knobs in {**family, "toy": knobs_of(Toy)}.items():
        fields = DECODERS[name].__pydantic_fields__
        assert [knob.name for knob in knobs] == [one.name for one in fields_of(DECODERS[name])] and knobs == knobs_of(
            DECODERS[name]
        )
        for knob in knobs:
            field = fields[knob.name]
            words = get_origin(field.annotation) is Literal
            branches = (field.annotation,) if words else get_args(field.annotation) or (field.annotation,)
            parts = [
                str(part).replace("typing.", "") if words or get_args(part) else part.__name__
                for part in branches
                if part is not NoneType
            ]
            assert knob.type == " | ".join(parts) and knob.optional == (knob.name in may_be_none(DECODERS[name]))
            assert knob.default == field.default
            bounds = {key: getattr(part, key) for part in field.metadata for key in knob.bounds if hasattr(part, key)}
            assert knob.bounds == bounds


def test_off_is_none_where_a_knob_may_be_none_and_nowhere_else():
    assert decoder_section(None, None, {"name": "toy", "beta": "off"}) == {"name": "toy", "beta": None}
    assert decoder_section(tau_edit="off")["tau_edit"] is None and decoder_section(tau_mask="off")["tau_mask"] == "off"
    assert GenerateBody(prompt="a", tau_edit="off").tau_edit == "off"


@pytest.mark.parametrize("room", ["commands", "serve", "stages"])
def test_no_knob_is_spelled_outside_its_decoder(room):
    """But for the names that other engines have for it."""
    package = Path(hildanext.__file__).parent
    knobs = {knob.name for knob in knobs_of(DECODERS["threshold_edit"])} - {"temperature", "top_p", "top_k"}
    for path in sorted((package / room).rglob("*.py")):
        words = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        known = set(DECODING_ALIASES.values()) if path.name == "requests.py" else set()
        assert not (knobs - known) & words, path
