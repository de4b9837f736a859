"""OpenAI's optional fields: null, empty and neutral pass everywhere, what would mean more is refused in words."""

import pytest

pytest.importorskip("fastapi")

from hildanext.api import create_app
from hildanext.serve.openai_fields import CHAT, COMPLETIONS, MESSAGE, Neutral
from hildanext.serve.settings import ServeConfig
from serving import ScriptedEngine, ask

SAID = {"role": "user", "content": "Tell a story."}
ROUTES = {
    "/v1/chat/completions": (CHAT, {"model": "scripted", "messages": [SAID]}),
    "/v1/completions": (COMPLETIONS, {"model": "scripted", "prompt": "Once"}),
}
NULLABLE = (
    "mode effort decoder block_size steps seed stop ignore_eos deadline_seconds n stream stream_options diffusing "
    "stream_denoising temperature top_p top_k max_tokens logprobs"
).split()
"""Fields that mean something here, which may be null all the same."""


@pytest.fixture(scope="module")
def app():
    return create_app(ServeConfig(), ScriptedEngine())


def neutral(row):
    found = [part for part in getattr(row[0], "__metadata__", ()) if isinstance(part, Neutral)]
    return found[0].values if found else None


def refusal(answer):
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    assert "Input" not in error["message"] and "should be" not in error["message"]
    return error


@pytest.mark.parametrize("path", ROUTES)
class TestBodies:
    def test_null_is_accepted_of_all_optional_fields(self, app, path):
        table, body = ROUTES[path]
        nothing = dict.fromkeys([*table, *NULLABLE])
        answer = ask(app, "POST", path, json={**nothing, **body})
        assert answer.status_code == 200, answer.text

    def test_neutral_values_are_accepted(self, app, path):
        table, body = ROUTES[path]
        for name, row in table.items():
            for value in neutral(row) or ():
                answer = ask(app, "POST", path, json={**body, name: value})
                assert answer.status_code == 200, answer.text

    def test_what_means_more_is_refused_with_what_to_use_instead(self, app, path):
        table, body = ROUTES[path]
        for name, row in table.items():
            if neutral(row) is not None:
                error = refusal(ask(app, "POST", path, json={**body, name: {"type": "one that is not there"}}))
                assert "is not offered" in error["message"] and error["param"] == name
                assert error["code"] == "unsupported_value" and error["message"].count(": ") >= 2

    def test_hints_that_change_no_answer_are_accepted(self, app, path):
        values = {
            "user": "u",
            "store": True,
            "metadata": {"a": "b"},
            "parallel_tool_calls": True,
            "safety_identifier": "s",
            "prompt_cache_key": "k",
            "prompt_cache_retention": "24h",
            "prompt_cache_options": {"mode": "implicit"},
            "prediction": {"type": "content", "content": "Once"},
        }
        table, body = ROUTES[path]
        given = {name: value for name, value in values.items() if name in table}
        assert ask(app, "POST", path, json={**body, **given}).status_code == 200


@pytest.mark.parametrize(
    ("path", "name", "value", "said"),
    [
        ("/v1/chat/completions", "tools", [{"type": "function"}], "no tools are called here"),
        ("/v1/chat/completions", "tool_choice", "required", 'only "none" or "auto"'),
        ("/v1/chat/completions", "response_format", {"type": "json_schema", "json_schema": {}}, "ask for JSON"),
        ("/v1/chat/completions", "modalities", ["text", "audio"], "text alone"),
        ("/v1/chat/completions", "service_tier", "priority", "served alike"),
        ("/v1/chat/completions", "verbosity", "low", "in a message"),
        ("/v1/chat/completions", "web_search_options", {}, "nothing is searched"),
        ("/v1/chat/completions", "top_logprobs", 5, "ask for 1 at most"),
        ("/v1/completions", "logprobs", 5, "ask for 1 at most"),
        ("/v1/completions", "presence_penalty", 0.5, "only 0"),
        ("/v1/completions", "presence_penalty", False, "only 0"),
        ("/v1/completions", "logit_bias", {"5": -100}, "only {}"),
        ("/v1/completions", "suffix", "the end", "is not filled"),
    ],
)
def test_refusals_are_about_the_value(app, path, name, value, said):
    assert said in refusal(ask(app, "POST", path, json={**ROUTES[path][1], name: value}))["message"]


class TestMessages:
    def talk(self, app, *messages):
        return ask(app, "POST", "/v1/chat/completions", json={"model": "scripted", "messages": [*messages]})

    def test_an_answer_goes_back_as_it_came_with_every_field_that_a_client_adds(self, app):
        answered = self.talk(app, SAID).json()["choices"][0]["message"]
        assert answered == {"role": "assistant", "content": "well", "refusal": None}
        for fields in (
            answered,
            {**dict.fromkeys(MESSAGE), **answered},
            {**answered, "annotations": [], "tool_calls": []},
        ):
            assert self.talk(app, SAID, fields, SAID).status_code == 200

    def test_neutral_values_of_a_message_are_accepted(self, app):
        for name, row in MESSAGE.items():
            for value in neutral(row) or ():
                assert self.talk(app, {**SAID, name: value}).status_code == 200

    def test_an_assistant_may_have_said_nothing_and_nobody_else(self):
        engine = ScriptedEngine()
        app = create_app(ServeConfig(), engine)
        for empty in (
            {"role": "assistant", "content": None},
            {"role": "assistant"},
            {"role": "assistant", "content": []},
        ):
            assert self.talk(app, SAID, empty, SAID).status_code == 200
            assert [message.content for message in engine.requests[-1].messages][1] == ""
        for role in ("system", "developer", "user"):
            error = refusal(self.talk(app, {"role": role, "content": None}))
            assert error["message"] == f"messages[0].content: of a {role} message it is missing: give its text"

    @pytest.mark.parametrize(
        ("message", "param", "said"),
        [
            ({"role": "tool", "content": "4", "tool_call_id": "a"}, "messages[0].role", "no tools"),
            ({"role": "function", "content": "4", "name": "f"}, "messages[0].role", "no tools"),
            ({"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}, "messages[0].tool_calls", "no tools"),
            ({"role": "assistant", "content": "", "refusal": "No."}, "messages[0].refusal", "as content"),
            ({"role": "assistant", "content": "", "audio": {"id": "a"}}, "messages[0].audio", "text alone"),
            ({**SAID, "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content[0]", "in words"),
            ({**SAID, "content": [{"type": "input_audio"}]}, "messages[0].content[0]", "text alone"),
        ],
    )
    def test_what_is_no_text_is_refused_in_words(self, app, message, param, said):
        error = refusal(self.talk(app, message))
        assert error["param"] == param and said in error["message"]


@pytest.mark.parametrize("stop", [None, "", [], "a", ["a", "b"]])
def test_stops_may_be_empty(app, stop):
    for path, (_, body) in ROUTES.items():
        assert ask(app, "POST", path, json={**body, "stop": stop}).status_code == 200


def test_options_of_a_stream_that_ask_for_nothing_need_no_stream(app):
    for path, (_, body) in ROUTES.items():
        for options in (None, {}, {"include_usage": None}, {"include_usage": False, "include_obfuscation": None}):
            assert ask(app, "POST", path, json={**body, "stream_options": options}).status_code == 200
        wanting = {**body, "stream_options": {"include_usage": True}}
        assert "stream: true" in refusal(ask(app, "POST", path, json=wanting))["message"]


def test_a_null_prompt_begins_a_new_document():
    engine = ScriptedEngine()
    answer = ask(
        create_app(ServeConfig(), engine), "POST", "/v1/completions", json={"model": "scripted", "prompt": None}
    )
    assert answer.status_code == 200 and engine.requests[0].prompt == ""
