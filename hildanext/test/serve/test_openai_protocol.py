"""OpenAI's own Python client against a real server, with no special cases."""

from dataclasses import replace

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import openai
from pydantic import ValidationError

from hildanext.api import create_app
from hildanext.ar import Parent
from hildanext.data.chat_template import Message, set_template
from hildanext.engine.base import EngineFailed, Failed, Piece, Request, Started, Stepped, complete
from hildanext.engine.local import LocalEngineConfig
from hildanext.likelihood.conditional import Pair, score_parent
from hildanext.serve.requests import CompletionBody, GenerateBody
from hildanext.serve.settings import ServeConfig
from hildanext.tokenization import encode_prompt
from serving import ScriptedEngine, ask, at_once, events, live

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
        completion = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=16)
        messages = tuple(Message(message["role"], message["content"]) for message in MESSAGES)
        own = complete(engine, Request(messages=messages, max_new_tokens=16))
        choice = completion.choices[0]
        assert choice.message.content == own.text and choice.message.role == "assistant"
        assert choice.finish_reason == {"eos": "stop", "length": "length"}[own.finish_reason]
        assert completion.usage.prompt_tokens == own.prompt_tokens and completion.usage.completion_tokens == len(
            own.tokens
        )
        details = completion.usage.completion_tokens_details
        assert details.forward_passes >= details.denoising_steps > 0 and details.edited_tokens == own.stats.edits
        assert completion.usage.prompt_tokens_details.cached_tokens >= 0

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
        assert texts == [single.choices[0].message.content for single in alone] and texts[0] != texts[1]
        assert two.usage.prompt_tokens == alone[0].usage.prompt_tokens
        assert two.usage.completion_tokens == sum(single.usage.completion_tokens for single in alone)

    def test_two_choices_stream_side_by_side(self, client):
        asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 16, "temperature": 1.0, "n": 2, "seed": 5}
        texts = ["", ""]
        for chunk in client.chat.completions.create(**asked, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert texts == [choice.message.content for choice in client.chat.completions.create(**asked).choices]

    def test_log_probabilities_are_those_at_commit(self, client):
        completion = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=12, logprobs=True)
        content = completion.choices[0].logprobs.content
        assert len(content) == completion.usage.completion_tokens and all(token.logprob <= 0 for token in content)
        text = completion.choices[0].message.content
        assert "".join(token.token for token in content) == text and text
        assert b"".join(bytes(token.bytes) for token in content) == text.encode()

    def test_content_may_come_in_parts_and_from_a_developer(self, client):
        parts = [
            {"role": "developer", "content": "Tell stories."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "Tell one "}, {"type": "text", "text": "about a cat."}],
            },
        ]
        texts = [
            client.chat.completions.create(model="tiny", messages=messages, max_tokens=8).choices[0].message.content
            for messages in (MESSAGES, parts)
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

    @pytest.mark.parametrize("prompt", [[-1] * 200_000, [[-1] * 100_000] * 2])
    def test_many_wrong_ids_are_one_complaint(self, prompt):
        """One about each holds the event loop for seconds."""
        with pytest.raises(ValidationError) as problem:
            CompletionBody.model_validate({"model": "m", "prompt": prompt})
        assert problem.value.error_count() <= 4  # of each form that a prompt may have
        with pytest.raises(ValidationError) as problem:
            GenerateBody.model_validate({"tokens": [-1] * 200_000})
        assert problem.value.error_count() == 1

    def test_token_ids_are_prompts_too(self, client, engine):
        ids = [engine.tokenizer.bos_token_id, *engine.tokenizer("Once upon a time")["input_ids"]]
        asked = {"model": "tiny", "max_tokens": 8}
        text = client.completions.create(**asked, prompt="Once upon a time").choices[0].text
        assert client.completions.create(**asked, prompt=ids).choices[0].text == text
        two = client.completions.create(**asked, prompt=[ids, ids[:3]])
        assert two.choices[0].text == text and len(two.choices) == 2

    def test_the_parent_is_a_model_of_its_own(self, client, engine):
        completion = client.completions.create(model="tiny-parent", prompt="Once upon a time", max_tokens=8)
        own = complete(engine, Request(prompt="Once upon a time", max_new_tokens=8, parent=True))
        assert (
            completion.choices[0].text == own.text and completion.usage.completion_tokens_details.denoising_steps == 0
        )

    def test_log_probabilities_have_the_old_form(self, client):
        completion = client.completions.create(model="tiny", prompt="Once upon", max_tokens=8, logprobs=0)
        logprobs = completion.choices[0].logprobs
        assert (
            len(logprobs.tokens)
            == len(logprobs.token_logprobs)
            == len(logprobs.text_offset)
            == completion.usage.completion_tokens
        )
        assert logprobs.text_offset[1] == len(logprobs.tokens[0])
        assert "".join(logprobs.tokens) == completion.choices[0].text

    def test_one_alternative_is_the_greedy_token_itself_and_of_drawn_ones_it_is_not_known(self, client):
        asked = {"model": "tiny", "prompt": "Once upon", "max_tokens": 8, "logprobs": 1}
        logprobs = client.completions.create(**asked).choices[0].logprobs
        pairs = zip(logprobs.tokens, logprobs.token_logprobs, strict=True)
        assert logprobs.top_logprobs == [{token: logprob} for token, logprob in pairs]
        with pytest.raises(openai.BadRequestError, match="temperature to 0"):
            client.completions.create(**asked, temperature=1.0)
        chat = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4, "logprobs": True, "top_logprobs": 1}
        for one in client.chat.completions.create(**chat).choices[0].logprobs.content:
            assert [(top.token, top.logprob) for top in one.top_logprobs] == [(one.token, one.logprob)]
        with pytest.raises(openai.BadRequestError, match="add logprobs: true"):
            client.chat.completions.create(**{**chat, "logprobs": False})

    @pytest.mark.parametrize("more", [{"model": "tiny-parent"}, {"model": "tiny", "extra_body": {"block_size": 1}}])
    def test_echo_with_logprobs_is_the_exact_likelihood_that_harnesses_ask_for(self, client, engine, more):
        context, continuation = "Once upon a time there", " was a little dog"
        asked = {**more, "prompt": context + continuation, "echo": True, "logprobs": 1, "temperature": 0}
        choice = client.completions.create(**asked, max_tokens=1).choices[0]
        logprobs = choice.logprobs
        ids = encode_prompt(engine.tokenizer, context + continuation)
        own = engine.parent if "parent" in more["model"] else Parent(engine.model.causal_lm, None, engine.model.banned)
        (scored,) = score_parent(own, [Pair(tuple(ids[:-4]), tuple(ids[-4:]))])
        assert "".join(logprobs.tokens) == choice.text and choice.text.startswith(context + continuation)
        assert logprobs.text_offset[-5] == len(context) and len(logprobs.tokens) == len(ids), "the BOS was not sent"
        assert sum(logprobs.token_logprobs[-5:-1]) == pytest.approx(-scored.nats, abs=1e-4)
        as_tokens = client.completions.create(**{**asked, "prompt": ids}, max_tokens=1).choices[0].logprobs
        assert as_tokens.token_logprobs[0] is as_tokens.top_logprobs[0] is None
        assert as_tokens.token_logprobs[1:] == pytest.approx(logprobs.token_logprobs)
        alone = client.completions.create(**asked, max_tokens=0)
        assert alone.choices[0].text == context + continuation and alone.usage.completion_tokens == 0
        assert alone.choices[0].logprobs.token_logprobs == pytest.approx(logprobs.token_logprobs[:-1])
        (last,) = logprobs.top_logprobs[-1]
        assert last == logprobs.tokens[-1], "what was written is the most probable one"

    def test_the_parent_has_log_probabilities_of_what_it_writes(self, client, engine):
        asked = {"model": "tiny-parent", "prompt": "Once upon", "max_tokens": 6, "logprobs": 1}
        choice = client.completions.create(**asked).choices[0]
        logprobs = choice.logprobs
        own = complete(engine, Request(prompt="Once upon", max_new_tokens=6, parent=True))
        assert "".join(logprobs.tokens) == choice.text == own.text and len(logprobs.token_logprobs) == 6
        chat = client.chat.completions.create(model="tiny-parent", messages=MESSAGES, max_tokens=4, logprobs=True)
        assert len(chat.choices[0].logprobs.content) == chat.usage.completion_tokens

    def test_an_echo_is_the_prompt_before_the_text_whole_or_streamed_as_text_or_tokens(self, client, engine):
        asked = {"model": "tiny", "max_tokens": 8}
        text = client.completions.create(**asked, prompt="Once upon a time").choices[0].text
        for prompt in ("Once upon a time", encode_prompt(engine.tokenizer, "Once upon a time")):
            echoed = client.completions.create(**asked, prompt=prompt, echo=True).choices[0].text
            assert echoed == "Once upon a time" + text
            chunks = client.completions.create(**asked, prompt=prompt, echo=True, stream=True)
            assert "".join(chunk.choices[0].text for chunk in chunks) == echoed

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
        assert {token["state"] for picture in pictures for token in picture["tokens"]} >= {"mask", "draft", "committed"}
        assert pictures[-1]["final"] and pictures[-1]["n_masked"] == 0

    def test_the_end_of_text_is_in_the_cells_and_in_no_text(self):
        drafts = [(1, 5, "well"), (2, 9, "<|endoftext|>")]
        cells = [{"position": at, "token": token, "text": text, "probability": 0.5} for at, token, text in drafts]
        record = {"forward": 1, "kind": "denoise", "block_start": 0, "masks": [1, 2], "drafts": cells, "edits": []}

        def act(request, sink):
            sink(Started(1, 0, 0.0))
            sink(Stepped({**record, "final": True}))
            at_once(request, sink)

        engine = ScriptedEngine(act)
        engine.facts = replace(ScriptedEngine.facts, supports_steps=True, special_tokens=frozenset({9}))
        app = create_app(ServeConfig(), engine)
        body = {"model": "scripted", "prompt": "x", "max_tokens": 2, "stream": True}
        response = ask(app, "POST", "/v1/completions", json={**body, "diffusing": True})
        assert "well" in response.text and "endoftext" not in response.text
        received = events(ask(app, "POST", "/v1/completions", json={**body, "stream_denoising": True}).text)
        (picture,) = (data["diffusion"] for _, data in received if "diffusion" in data)
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
            ({"response_format": {"type": "json_object"}}, "ask for JSON in a message"),
            ({"presence_penalty": 1.0}, "presence_penalty"),
            ({"logit_bias": {"1": 5}}, "logit_bias"),
            ({"stream_options": {"include_usage": True}}, "stream: true"),
            ({"reasoning_effort": "endless"}, "unknown effort"),
            ({"extra_body": {"effort": "low"}, "reasoning_effort": "low"}, "give one"),
            ({"extra_body": {"diffusing": True}}, "stream: true"),
            ({"extra_body": {"diffusing": True, "stream_denoising": True}, "stream": True}, "give one"),
            ({"extra_body": {"max_tokes": 1}}, "did you mean max_tokens"),
            ({"model": "tiny-parent", "stream": True, "extra_body": {"diffusing": True}}, "has none"),
            ({"messages": []}, "messages"),
        ],
    )
    def test_bad_requests_are_the_client_s_own_error(self, client, more, said):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, **more})
        assert said in caught.value.message and caught.value.type == "invalid_request_error"

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            ({"prompt": []}, "prompt"),
            ({"prompt": ["a", 1]}, "prompt"),
            ({"prompt": "a <|mask|>"}, "mask token"),
            ({"logprobs": 2}, "ask for 1 at most"),
            ({"echo": True, "logprobs": 1}, "inside a block of 8 tokens.*ask 'tiny-parent', set block_size to 1"),
            ({"echo": True, "stream": True, "extra_body": {"diffusing": True}}, "diffusing"),
            ({"max_tokens": 0}, "0 new tokens"),
            ({"max_tokens": 0, "echo": True}, "echo with logprobs"),
            ({"best_of": 3}, "beyond n"),
            ({"suffix": "a"}, "is not offered"),
        ],
    )
    def test_what_completions_cannot_do_is_told(self, client, more, said):
        with pytest.raises(openai.BadRequestError, match=said):
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

        with live(ServeConfig(port=0), ScriptedEngine(act)) as address:
            with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
                stream = client.completions.create(model="scripted", prompt="a", stream=True)
                assert next(stream).choices[0].text == "well"
                with pytest.raises(openai.APIError, match="the engine broke"):
                    list(stream)
