"""Chat templates: rendered as Transformers does, and stopped where they would take all time or memory."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from hildanext.core.errors import ModelError
from hildanext.data.chat_template import PLAIN_TEMPLATE, BadExample, Message, chat_text
from hildanext.data.template_rendering import TemplateFailed, TemplateRefused, render_template
from small_models import small_tokenizer

TALK = [Message("system", "Be brief."), Message("user", "Hi {{ there }} <é>"), Message("assistant", "Yes\n")]
TEMPLATES = {
    "plain": PLAIN_TEMPLATE,
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content|length %}"
    "{{ loop.index0 }}{{ m['role'] }}:{{ m.content | trim }}{{ eos_token }}\n{% endfor %}{{ ns.n }}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ dict(a=1) }}{{ tools is none }}",
    "loops": "{%- for m in messages %}\n  {%- if loop.last %}{% continue %}{% endif %}\n[{{ m.content }}]\n{% endfor %}"
    "{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}",
    "macro": "{% macro say(m) %}<{{ m.role }}>{{ caller() if caller else m.content }}{% endmacro %}"
    "{% for m in messages %}{{ say(m) }}{% endfor %}{{ bos_token }}{{ nothing }}{{ strftime_now('%Y') }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("answer", [True, False])
def test_a_template_gives_the_text_that_transformers_gives(name: str, answer: bool):
    tokenizer = small_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    turns = [message._asdict() for message in TALK]
    want = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer)
    assert chat_text(tokenizer, TALK, answer) == want


ENDLESS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a loop in a filter": "{{ range(99999) | map('string') | list | length }}" * 2
    + "{% for a in range(99999) %}{% set x = range(99999) | sum %}{% endfor %}",
    "a power": "{% set n = 9 ** 9 %}{% set x = 9 ** n %}",
}
HUGE = {
    "a long text": "{{ 'a' * 10 ** 9 }}",
    "a long text that is not shown": "{% set x = ('a' * 10 ** 9) | length %}",
    "a wide filter": "{{ 'a' | center(10 ** 9) }}",
    "a wide format": "{{ '%1000000000d' | format(1) }}",
    "doubling": "{% set s = namespace(x='aaaaaaaa') %}{% for i in range(30) %}{% set s.x = s.x ~ s.x %}{% endfor %}",
    "a list": "{{ ([0] * 10 ** 9) | length }}",
    "a recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "more than its conversation": "{{ 'a' * 20000000 }}",
    "deep brackets": "{{ " + "(" * 5_000 + "1" + ")" * 5_000 + " }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_is_stopped(name: str):
    begun = time.monotonic()
    with pytest.raises(ModelError, match=r"the chat template takes more than 0\.5 s"):
        render_template(ENDLESS[name], {}, seconds=0.5)
    assert time.monotonic() - begun < 5
    assert render_template("{{ x }}", {"x": 1}) == "1", "the next conversation is rendered again"


@pytest.mark.parametrize("name", HUGE)
def test_a_template_that_takes_all_memory_is_stopped(name: str):
    with pytest.raises(ModelError, match="the chat template (takes|ends the program)") as caught:
        render_template(HUGE[name], {}, seconds=30.0)
    assert "\n" not in str(caught.value) and caught.value.hint
    assert render_template("{{ x }}", {"x": 1}) == "1"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "^roles must alternate$"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{% if %}", "Expected an expression"),
        ("{{ x.__class__.__mro__ }}", "unsafe"),
        ("{% set ns = namespace(_x=1) %}", "_x"),
    ],
)
def test_a_template_s_own_fault_is_told_in_one_line(template: str, says: str):
    with pytest.raises(TemplateRefused, match=says) as caught:
        render_template(template, {"x": 1})
    assert "\n" not in str(caught.value)
    tokenizer = small_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(BadExample, match="the chat template refuses it"):
        chat_text(tokenizer, TALK)


def test_many_threads_render_at_once():
    with ThreadPoolExecutor(8) as pool:
        texts = pool.map(lambda n: render_template("{{ x }}{{ y }}", {"x": n, "y": "é\ud83e"}), range(64))
        assert list(texts) == [f"{n}é\ud83e" for n in range(64)]


def test_a_usual_conversation_costs_no_millisecond():
    tokenizer = small_tokenizer()
    tokenizer.chat_template = PLAIN_TEMPLATE
    chat_text(tokenizer, TALK)
    times = []
    for _ in range(50):
        begun = time.perf_counter()
        chat_text(tokenizer, TALK)
        times.append(time.perf_counter() - begun)
    assert min(times) < 1e-3


def test_a_template_that_cannot_end_is_the_model_s_fault():
    assert TemplateFailed("x").status == 500
