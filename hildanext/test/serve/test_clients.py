"""Unmodified clients hold a conversation of five turns, each answer appended as it came, whole and streamed.

The Python ones are in the extra `clients`. Vercel's AI SDK runs where `HILDA_NODE_CLIENTS` names a folder in which
`npm install ai @ai-sdk/openai-compatible` was run.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from hildanext.data.chat_template import Message, set_template
from hildanext.engine.base import Request, complete
from hildanext.engine.local import LocalEngineConfig
from hildanext.serve.settings import ServeConfig
from serving import live

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # warnings are the clients' own

QUESTIONS = ["Tell a story.", "About a cat?", "What did it do?", "And then?", "The end?"]
LENGTH = 12
STREAMED = pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])

AI_SDK = """
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateText, streamText } from 'ai';
const [base, streamed, length, ...questions] = process.argv.slice(2);
const model = createOpenAICompatible({ name: 'hilda', baseURL: base, apiKey: 'any' })('tiny');
const messages = [], answers = [];
for (const question of questions) {
  messages.push({ role: 'user', content: question });
  const asked = { model, messages, maxOutputTokens: Number(length), maxRetries: 0 };
  const onError = ({ error }) => { throw error; };
  const told = streamed === 'true' ? streamText({ ...asked, onError }) : await generateText(asked);
  answers.push(await told.text);
  messages.push(...(await told.response).messages);
}
console.log(JSON.stringify(answers));
"""


@pytest.fixture(scope="module")
def engine():
    opened = LocalEngineConfig(threads=1, dtype="fp32").open("tiny", None, "for a test")
    set_template(opened.tokenizer, "auto")
    return opened  # closed by its server


@pytest.fixture(scope="module")
def base(engine):
    with live(ServeConfig(port=0), engine) as address:
        yield f"{address}/v1"


@pytest.fixture(scope="module")
def wanted(engine, base):
    """The engine's own answers to the same conversation."""
    said, answers = [], []
    for question in QUESTIONS:
        said.append(Message("user", question))
        answers.append(complete(engine, Request(messages=tuple(said), max_new_tokens=LENGTH)).text)
        said.append(Message("assistant", answers[-1]))
    return answers


def converse(question, answer):
    """Texts of a conversation; `question(text)` makes a message, `answer(messages)` gives the next one and its text."""
    messages, texts = [], []
    for text in QUESTIONS:
        messages.append(question(text))
        message, said = answer(messages)
        messages.append(message)
        texts.append(said)
    return texts


def user(text):
    return {"role": "user", "content": text}


@STREAMED
@pytest.mark.parametrize("form", ["as it came", "dumped", "dumped without nulls"])
def test_openai_for_python(base, wanted, streamed, form):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=base, api_key="any", max_retries=0) as client:

        def answer(messages):
            asked = {"model": "tiny", "messages": messages, "max_tokens": LENGTH}
            if streamed:
                with client.chat.completions.stream(**asked) as stream:
                    stream.until_done()
                    message = stream.current_completion_snapshot.choices[0].message
            else:
                message = client.chat.completions.create(**asked).choices[0].message
            dumped = message.model_dump(exclude_none=form.endswith("nulls"))
            return (message if form == "as it came" else dumped), message.content

        assert converse(user, answer) == wanted


@STREAMED
def test_langchain(base, wanted, streamed):
    chat = pytest.importorskip("langchain_openai", reason="install hildanext[clients]")
    messages = pytest.importorskip("langchain_core.messages")
    model = chat.ChatOpenAI(model="tiny", base_url=base, api_key="any", max_tokens=LENGTH, max_retries=0)

    def answer(said):
        if not streamed:
            message = model.invoke(said)
            return message, message.content
        chunks = list(model.stream(said))
        message = chunks[0]
        for chunk in chunks[1:]:
            message += chunk
        return message, message.content

    assert converse(messages.HumanMessage, answer) == wanted


@STREAMED
def test_litellm(base, wanted, streamed, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would be fetched
    litellm = pytest.importorskip("litellm", reason="install hildanext[clients]")

    def answer(messages):
        asked = {"model": "openai/tiny", "api_base": base, "api_key": "any", "max_tokens": LENGTH, "num_retries": 0}
        answered = litellm.completion(messages=messages, stream=streamed, **asked)
        if streamed:
            answered = litellm.stream_chunk_builder(list(answered), messages=messages)
        message = answered.choices[0].message
        return message, message.content

    assert converse(user, answer) == wanted


@STREAMED
def test_the_ai_sdk(base, wanted, streamed, tmp_path):
    node, folder = shutil.which("node"), os.environ.get("HILDA_NODE_CLIENTS")
    if node is None or not folder or not (Path(folder) / "node_modules" / "ai").is_dir():
        pytest.skip("node is not there, or HILDA_NODE_CLIENTS names no folder with the packages of the AI SDK")
    (tmp_path / "node_modules").symlink_to(Path(folder).resolve() / "node_modules")
    (tmp_path / "talk.mjs").write_text(AI_SDK)
    words = [node, str(tmp_path / "talk.mjs"), base, str(streamed).lower(), str(LENGTH), *QUESTIONS]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == wanted
