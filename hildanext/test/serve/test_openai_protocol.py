"""OpenAI's own Python client against a real server, with no special cases."""

from dataclasses import replace

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import openai

from hildanext.api import create_app
from hildanext.data.chat_template import Message, set_template
from hildanext.engine.base import EngineFailed, Failed, Piece, Request, Started, Stepped, complete
from hildanext.engine.local import LocalEngineConfig
from hildanext.serve.settings import ServeConfig
from serving import ToldEngine, ask, at_once, events, live

KEY = "test-key"
MESSAGES = [{"role": "system", "content": "Tell stories."}, {"role": "user", "content": "Tell one about a cat."}]


@pytest.fixture(scope="module")
def engine():
    opened = LocalEngineConfig(threads=1, dtype="fp32").open("tiny", "tiny", "for a test")
    set_template(opened.tokenizer, "auto")
    return opened  # closed by its server


@pytest.fixture(scope="module")
def address(engine):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("A_KEY", KEY)
        with live(ServeConfig(port=0, api_key_env="A_KEY"), engine) as address:
            yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_the_list_of_models_names_both(client):
    assert [model.id for model in client.models.list()] == ["tiny", "tiny-parent"]
    assert client.models.retrieve("tiny-parent").kind == "autoregressive"
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.models.retrieve("gpt")


class TestChat:
    def test_an_answer_is_the_engine_s_own_with_its_usage(self, client, engine):
        told = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=16)
        messages = tuple(Message(one["role"], one["content"]) for one in MESSAGES)
        own = complete(engine, Request(messages=messages, max_new_tokens=16))
        choice = told.choices[0]
        assert choice.message.content == own.text and choice.message.role == "assistant"
        assert choice.finish_reason == {"eos": "stop", "length": "length"}[own.finish_reason]
        assert told.usage.prompt_tokens == own.prompt_tokens and told.usage.completion_tokens == len(own.tokens)
        details = told.usage.completion_tokens_details
        assert details.forward_passes >= details.denoising_steps > 0 and details.edited_tokens == own.stats.edits
        assert told.usage.prompt_tokens_details.cached_tokens >= 0

    def test_a_stream_is_the_same_text_and_ends_with_its_usage(self, client):
        asked = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 24}
        whole = client.chat.completions.create(**asked)
        chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert chunks[0].choices[0].delta.role == "assistant"
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
        assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        assert all(chunk.usage is None for chunk in chunks[:-1]) and len({chunk.id for chunk in chunks}) == 1
        plain = list(client.chat.completions.create(**asked, stream=True))
        assert all("usage" not in chunk.model_fields_set for chunk in plain)

    def test_the_client_s_own_accumulator_puts_a_stream_together(self, client):
        asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 40}
        word = client.chat.completions.create(**asked).choices[0].message.content.split()[5]
        whole = client.chat.completions.create(**asked, stop=word).choices[0].message.content
        with client.chat.completions.stream(**asked, stop=word) as stream:
            assert stream.get_final_completion().choices[0].message.content == whole

    def test_two_choices_draw_from_seed_and_seed_plus_one(self, client):
        asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 16, "temperature": 1.0}
        two = client.chat.completions.create(**asked, n=2, seed=5)
        alone = [client.chat.completions.create(**asked, seed=seed) for seed in (5, 6)]
        texts = [choice.message.content for choice in two.choices]
        assert texts == [one.choices[0].message.content for one in alone] and texts[0] != texts[1]
        assert two.usage.prompt_tokens == alone[0].usage.prompt_tokens
        assert two.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)

    def test_two_choices_stream_side_by_side(self, client):
        asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 16, "temperature": 1.0, "n": 2, "seed": 5}
        texts = ["", ""]
        for chunk in client.chat.completions.create(**asked, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert texts == [choice.message.content for choice in client.chat.completions.create(**asked).choices]

    def test_log_probabilities_are_those_at_commit(self, client):
        told = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=12, logprobs=True)
        content = told.choices[0].logprobs.content
        assert len(content) == told.usage.completion_tokens and all(one.logprob <= 0 for one in content)
        text = told.choices[0].message.content
        assert "".join(one.token for one in content) == text and text
        assert b"".join(bytes(one.bytes) for one in content) == text.encode()

    def test_content_may_come_in_parts_and_from_a_developer(self, client):
        parts = [
            {"role": "developer", "content": "Tell stories."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "Tell one "}, {"type": "text", "text": "about a cat."}],
            },
        ]
        texts = [
            client.chat.completions.create(model="tiny", messages=one, max_tokens=8).choices[0].message.content
            for one in (MESSAGES, parts)
        ]
        assert texts[0] == texts[1]

    def test_efforts_have_openai_s_names(self, client):
        asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 16}
        quick = client.chat.completions.create(**asked, reasoning_effort="minimal").usage.completion_tokens_details
        ours = client.chat.completions.create(**asked, extra_body={"effort": "instant"}).usage.completion_tokens_details
        slow = client.chat.completions.create(**asked, reasoning_effort="high").usage.completion_tokens_details
        assert quick.denoising_steps == ours.denoising_steps < slow.denoising_steps and quick.edited_tokens == 0


class TestCompletions:
    def test_a_stop_text_ends_the_text_before_it(self, client):
        asked = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 40}
        whole = client.completions.create(**asked).choices[0].text
        word = whole.split()[6]
        for stop in (word, ["nothing like that", word]):
            cut = client.completions.create(**asked, stop=stop).choices[0]
            assert cut.finish_reason == "stop" and cut.text == whole[: whole.index(word)]

    def test_several_prompts_and_choices_come_in_order(self, client):
        asked = {"model": "tiny", "max_tokens": 8, "temperature": 1.0}
        both = client.completions.create(**asked, prompt=["Once", "The dog"], n=2, seed=3)
        assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
        alone = client.completions.create(**asked, prompt="The dog", n=2, seed=5)
        assert [choice.text for choice in both.choices[2:]] == [choice.text for choice in alone.choices]

    def test_token_ids_are_prompts_too(self, client, engine):
        ids = [engine.tokenizer.bos_token_id, *engine.tokenizer("Once upon a time")["input_ids"]]
        asked = {"model": "tiny", "max_tokens": 8}
        text = client.completions.create(**asked, prompt="Once upon a time").choices[0].text
        assert client.completions.create(**asked, prompt=ids).choices[0].text == text
        two = client.completions.create(**asked, prompt=[ids, ids[:3]])
        assert two.choices[0].text == text and len(two.choices) == 2

    def test_the_parent_is_a_model_of_its_own(self, client, engine):
        told = client.completions.create(model="tiny-parent", prompt="Once upon a time", max_tokens=8)
        own = complete(engine, Request(prompt="Once upon a time", max_new_tokens=8, parent=True))
        assert told.choices[0].text == own.text and told.usage.completion_tokens_details.denoising_steps == 0

    def test_log_probabilities_have_the_old_form(self, client):
        told = client.completions.create(model="tiny", prompt="Once upon", max_tokens=8, logprobs=0)
        found = told.choices[0].logprobs
        assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == told.usage.completion_tokens
        assert found.text_offset[1] == len(found.tokens[0]) and "".join(found.tokens) == told.choices[0].text

    def test_a_stream_is_the_same_text(self, client):
        asked = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 20}
        text = "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True))
        assert text == client.completions.create(**asked).choices[0].text


class TestDenoising:
    ASKED = {"model": "tiny", "messages": MESSAGES, "max_tokens": 24, "stream": True}

    def test_diffusing_sends_frames_that_replace_the_last_of_which_is_the_answer(self, client):
        chunks = list(client.chat.completions.create(**self.ASKED, extra_body={"diffusing": True}))
        frames = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
        whole = client.chat.completions.create(**{**self.ASKED, "stream": False}).choices[0].message.content
        assert frames[-1] == whole and any("░" in frame for frame in frames[:-1])

    def test_stream_denoising_leaves_the_deltas_and_tells_the_canvas_between(self, client):
        chunks = list(client.chat.completions.create(**self.ASKED, extra_body={"stream_denoising": True}))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        whole = client.chat.completions.create(**{**self.ASKED, "stream": False})
        assert text == whole.choices[0].message.content
        pictures = [chunk.diffusion for chunk in chunks if getattr(chunk, "diffusion", None)]
        assert len(pictures) == whole.usage.completion_tokens_details.denoising_steps
        assert sum(picture["n_edited"] for picture in pictures) == whole.usage.completion_tokens_details.edited_tokens
        assert {one["state"] for picture in pictures for one in picture["tokens"]} >= {"mask", "draft", "committed"}
        assert pictures[-1]["final"] and pictures[-1]["n_masked"] == 0

    def test_the_end_of_text_is_in_the_cells_and_in_no_text(self):
        drafts = [(1, 5, "well"), (2, 9, "<|endoftext|>")]
        cells = [{"position": at, "token": token, "text": text, "probability": 0.5} for at, token, text in drafts]
        record = {"forward": 1, "kind": "denoise", "block_start": 0, "masks": [1, 2], "drafts": cells, "edits": []}

        def act(request, sink):
            sink(Started(1, 0, 0.0))
            sink(Stepped({**record, "final": True}))
            at_once(request, sink)

        engine = ToldEngine(act)
        engine.facts = replace(ToldEngine.facts, supports_steps=True, special_tokens=frozenset({9}))
        app = create_app(ServeConfig(), engine)
        body = {"model": "told", "prompt": "x", "max_tokens": 2, "stream": True}
        found = ask(app, "POST", "/v1/completions", json={**body, "diffusing": True})
        assert "well" in found.text and "endoftext" not in found.text
        found = events(ask(app, "POST", "/v1/completions", json={**body, "stream_denoising": True}).text)
        (picture,) = (data["diffusion"] for _, data in found if "diffusion" in data)
        assert picture["text"] == "well" and [cell["text"] for cell in picture["tokens"]] == ["well", "<|endoftext|>"]


class TestErrors:
    @pytest.mark.parametrize(
        ("more", "said"),
        [
            ({"temperature": -1}, "temperature"),
            ({"n": 0}, "n: "),
            ({"n": 100}, "16 at most"),
            ({"stop": ["a"] * 5}, "4 at most"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"max_tokens": 1, "max_completion_tokens": 2}, "differ"),
            ({"top_logprobs": 3, "logprobs": True}, "top_logprobs"),
            ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
            ({"response_format": {"type": "json_object"}}, "response_format.type"),
            ({"presence_penalty": 1.0}, "presence_penalty"),
            ({"logit_bias": {"1": 5}}, "logit_bias"),
            ({"stream_options": {"include_usage": True}}, "stream: true"),
            ({"reasoning_effort": "endless"}, "unknown effort"),
            ({"extra_body": {"effort": "low"}, "reasoning_effort": "low"}, "give one"),
            ({"extra_body": {"diffusing": True}}, "stream: true"),
            ({"extra_body": {"diffusing": True, "stream_denoising": True}, "stream": True}, "give one"),
            ({"extra_body": {"max_tokes": 1}}, "did you mean max_tokens"),
            ({"model": "tiny-parent", "logprobs": True}, "logprobs"),
            ({"model": "tiny-parent", "stream": True, "extra_body": {"diffusing": True}}, "has none"),
            ({"messages": []}, "messages"),
        ],
    )
    def test_bad_requests_are_the_client_s_own_error(self, client, more, said):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, **more})
        assert said in caught.value.message and caught.value.type == "invalid_request_error"

    @pytest.mark.parametrize(
        "more",
        [
            {"prompt": []},
            {"prompt": ["a", 1]},
            {"prompt": "a <|mask|>"},
            {"logprobs": 2},
            {"echo": True},
            {"best_of": 3},
            {"suffix": "a"},
        ],
    )
    def test_what_completions_cannot_do_is_told(self, client, more):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(**{"model": "tiny", "prompt": "a", **more})

    def test_a_wrong_key_and_a_wrong_model_are_their_own_errors(self, client, address):
        with openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0) as other:
            with pytest.raises(openai.AuthenticationError, match="the key is wrong"):
                other.models.list()
        with pytest.raises(openai.NotFoundError, match="no model 'gpt'") as caught:
            client.chat.completions.create(model="gpt", messages=MESSAGES)
        assert caught.value.param == "model" and caught.value.code == "model_not_found"

    def test_a_failure_inside_a_stream_reaches_the_client(self):
        def act(request, sink):
            sink(Started(1, 0, 0.0))
            sink(Piece("well"))
            sink(Failed(EngineFailed("the engine broke", "report it")))

        with live(ServeConfig(port=0), ToldEngine(act)) as address:
            with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
                stream = client.completions.create(model="told", prompt="a", stream=True)
                assert next(stream).choices[0].text == "well"
                with pytest.raises(openai.APIError, match="the engine broke"):
                    list(stream)
