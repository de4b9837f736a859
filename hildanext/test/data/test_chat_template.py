"""A conversation becomes the tokens that inference feeds: templates, turns, masks per turn, special tokens."""

from pathlib import Path
from typing import Any

import pytest

from hildanext.core.errors import ConfigError
from hildanext.data.chat_template import (
    PLAIN_TEMPLATE,
    BadExample,
    Example,
    Message,
    chat_text,
    encode_chat,
    make_example,
    render,
    set_template,
)
from hildanext.models.loading import tiny
from hildanext.models.loading.names import pulled_folder
from hildanext.tokenization import encode_prompt, load_tokenizer, save_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}{{ m['role'] + ': ' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'].strip() + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
"""What Qwen3's does: the last answer opens with an empty thought, earlier ones do not."""


def smollm2() -> Any:
    folder = pulled_folder("smollm2-135m")
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"no SmolLM2 at {folder} (hildanext pull smollm2-135m)")
    return load_tokenizer(folder)


def embedded(template: str | None = None) -> Any:
    tokenizer = load_tokenizer(tiny.folder("diffusion"))
    tokenizer.chat_template = template
    return tokenizer


def chatml() -> Any:
    tokenizer = load_tokenizer(tiny.folder("diffusion"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


TOKENIZERS = {
    "smollm2": smollm2,
    "plain": embedded,
    "chatml": chatml,
    "thinking": lambda: embedded(THINKING),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request) -> Any:
    tokenizer = TOKENIZERS[request.param]()
    set_template(tokenizer)
    return tokenizer


def talk(*turns: str) -> Example:
    """User and assistant take turns."""
    roles = ("user", "assistant")
    return make_example([Message(roles[number % 2], text) for number, text in enumerate(turns)])


LONG = talk(
    "How many apples does Lily have, if she had 5 and got 3 more from her friend Tom in the big park?",
    "Lily has 5+3=8 apples now.\n#### 8",
    "And if she gives 2 of these to her little brother, who likes apples very much, how many are left?",
    "Then 8-2=6 apples are left.\n#### 6",
)


@pytest.mark.parametrize("block_size", [1, 4, 8, 32])
def test_the_training_prefix_of_every_answer_is_what_generate_is_fed(tokenizer, block_size: int):
    """As `generate --chat` encodes the conversation so far, and as a plain prompt of the template's text is encoded."""
    turns = 0
    for row in render(tokenizer, LONG, block_size):
        for begin, end in row.answers:
            turn = [n for n, m in enumerate(LONG.messages) if m.role == "assistant"][turns]
            history = LONG.messages[:turn]
            assert row.ids[:begin] == encode_chat(tokenizer, history)
            assert row.ids[:begin] == encode_prompt(tokenizer, chat_text(tokenizer, history))
            assert row.ids[end - 1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in row.ids[begin : end - 1]
            answer = tokenizer.decode(row.ids[begin:end], skip_special_tokens=True)
            assert answer.removeprefix("<think>\n\n</think>\n\n") == LONG.messages[turn].content
            turns += 1
    assert turns == 2


def test_every_answer_is_supervised_once_and_nothing_else_is(tokenizer):
    for row in render(tokenizer, LONG):
        learnt = [index for index, flag in enumerate(row.supervised) if flag]
        assert learnt == [index for begin, end in row.answers for index in range(begin, end)]
    rows = render(tokenizer, LONG)
    texts = [row.text[row.offsets[b][0] : row.offsets[e - 1][1]] for row in rows for b, e in row.answers]
    wanted = [message.content for message in LONG.messages if message.role == "assistant"]
    for text, content in zip(texts, wanted, strict=True):
        ends = (tokenizer.eos_token, "<|im_end|>" + tokenizer.eos_token)
        assert text.removeprefix("<think>\n\n</think>\n\n") in [content + end for end in ends]


@pytest.mark.parametrize("kind", ["plain", "chatml"])
def test_a_template_that_only_appends_gives_one_row_and_one_that_rewrites_gives_two(kind: str):
    tokenizer = TOKENIZERS[kind]()
    set_template(tokenizer)
    # An end of turn that is not the end of text is followed by one, which the longer conversation has not.
    assert len(render(tokenizer, LONG)) == (1 if kind == "plain" else 2)
    assert len(render(embedded(THINKING), LONG)) == 2


def test_two_answers_in_one_block_go_to_rows_of_their_own():
    tokenizer = embedded(PLAIN_TEMPLATE)
    chat = talk("Hi", "Hello", "Bye", "Goodbye", "Still here?", "Yes")
    small, large = render(tokenizer, chat, 4), render(tokenizer, chat, 64)
    assert len(small) == 1 and len(small[0].answers) == 3
    assert [len(row.answers) for row in large] == [1, 1, 1]
    assert [row.ids[: row.answers[0][0]] for row in large] == [
        encode_chat(tokenizer, chat.messages[:turn]) for turn in (1, 3, 5)
    ]
    for block_size in (8, 16, 32):
        blocks = []
        for row in render(tokenizer, chat, block_size):
            parts = [set(range(b // block_size, (e - 1) // block_size + 1)) for b, e in row.answers]
            assert sum(map(len, parts)) == len(set().union(*parts))
            blocks += parts
        assert len(blocks) == 3


def test_fields_say_where_prompt_and_response_stand(tokenizer):
    row = render(tokenizer, LONG, 8)[-1]
    for name, text in (("prompt", LONG.prompt), ("response", LONG.response)):
        begin, end = row.fields[name]
        assert row.text[begin:end] == text
    eight = LONG.response.index("8-2") + row.fields["response"][0]
    tokens = [n for n, (low, high) in enumerate(row.offsets) if low <= eight < high]
    assert len(tokens) == 1 and "8" in tokenizer.decode([row.ids[tokens[0]]])


def test_fields_count_the_edges_that_a_template_strips():
    example = make_example([Message("user", "What?"), Message("assistant", "\n  so it is 42\n")])
    row = render(embedded(THINKING), example)[0]
    begin, _ = row.fields["response"]
    place = example.response.index("42")
    assert row.text[begin + place : begin + place + 2] == "42"


def test_offsets_point_at_each_token(tokenizer):
    row = render(tokenizer, LONG, 8)[-1]
    assert len(row.offsets) == len(row.ids)
    assert all(low <= high for low, high in row.offsets) and row.offsets[-1][1] == len(row.text)
    starts = [low for low, _ in row.offsets]
    assert starts == sorted(starts)


def test_options_are_written_into_the_template_and_survive_saving(tmp_path: Path):
    tokenizer = embedded(THINKING)
    set_template(tokenizer, options={"enable_thinking": True, "tone": "dry"})
    set_template(tokenizer, options={"enable_thinking": False, "tone": "dry"})
    assert tokenizer.chat_template.count("set enable_thinking") == tokenizer.chat_template.count("set tone") == 1
    row = render(tokenizer, talk("Why?", "Because"))[0]
    assert tokenizer.decode(row.ids[slice(*row.answers[0])]) == "Because" + tokenizer.eos_token
    save_tokenizer(tokenizer, tmp_path)
    again = load_tokenizer(tmp_path)
    assert encode_chat(again, [Message("user", "Why?")]) == row.ids[: row.answers[0][0]]


def test_a_base_model_gets_the_plain_template_and_another_keeps_its_own():
    base, own = embedded(), embedded(CHATML)
    assert set_template(base) == "plain" and base.chat_template == PLAIN_TEMPLATE
    assert set_template(own) == "own" and own.chat_template == CHATML
    assert set_template(own, "plain") == "plain" and own.chat_template == PLAIN_TEMPLATE
    text = chat_text(base, [Message("system", "Be brief."), Message("user", "Hi")])
    assert text == "Be brief.\n\nUser:\nHi\n\nAssistant:\n"
    with pytest.raises(ConfigError, match="no chat template"):
        set_template(embedded(), "own")
    with pytest.raises(ConfigError, match="no chat template"):
        encode_chat(embedded(), [Message("user", "Hi")])
    with pytest.raises(ConfigError, match="template option"):
        set_template(embedded(), options={"a b": True})


@pytest.mark.parametrize(
    ("turns", "kind"),
    [
        ([("user", "Hi"), ("tool", "42")], "unknown role"),
        ([("user", "Hi"), ("assistant", "  \n")], "empty turn"),
        ([("user", ""), ("assistant", "Hello")], "empty turn"),
        ([("user", "Hi")], "no assistant turn"),
        ([], "no assistant turn"),
        ([("assistant", "Hello"), ("user", "Hi")], "an answer before any user turn"),
    ],
)
def test_malformed_conversations_are_named(turns: list[tuple[str, str]], kind: str):
    with pytest.raises(BadExample) as problem:
        make_example([Message(*turn) for turn in turns])
    assert problem.value.kind == kind


@pytest.mark.parametrize("token", ["<|endoftext|>", "<|mask|>", "<|im_end|>"])
def test_a_special_token_in_a_turn_is_text_or_where_tokens_are_parsed_refused_if_it_ends_the_answer(token: str):
    tokenizer, example = chatml(), talk("Hi", f"Hello {token} there")
    (row,) = render(tokenizer, example)
    begin, end = row.answers[0]
    plain = tokenizer.backend_tokenizer.encode("Hello", add_special_tokens=False).ids
    assert row.ids[begin : begin + len(plain)] == plain
    assert row.ids[begin : end - 1].count(tokenizer.convert_tokens_to_ids(token)) == (token == "<|im_end|>")
    assert row.text[slice(*row.fields["response"])] == f"Hello {token} there"
    assert [row.text[a:b] for a, b in row.offsets[begin:end]][-1] == "<|endoftext|>"
    if token != "<|im_end|>":
        with pytest.raises(BadExample, match="a special token in a turn"):
            render(tokenizer, example, special_tokens_in_text=True)
    else:
        (row,) = render(tokenizer, example, special_tokens_in_text=True)
        assert row.ids.count(tokenizer.convert_tokens_to_ids(token)) == 3


def test_what_a_template_refuses_is_named():
    tokenizer = embedded("{{ raise_exception('only one turn') }}")
    with pytest.raises(BadExample, match="only one turn"):
        render(tokenizer, talk("Hi", "Hello"))


def test_the_name_of_an_example_is_its_own_or_its_text_s():
    first, again, other = talk("Hi", "Hello"), talk("Hi", "Hello"), talk("Hi", "Hello!")
    assert first.id == again.id != other.id
    assert make_example(first.messages, id="a1").id == "a1"


def test_turns_after_the_last_answer_are_dropped():
    assert talk("Hi", "Hello", "Bye").messages == talk("Hi", "Hello").messages
