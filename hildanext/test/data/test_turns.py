"""The keys of turns: weights are honoured, what nobody reads refuses the record with the key's name."""

from pathlib import Path
from typing import Any

import pytest

from corpus import write_jsonl
from hildanext.core.registry import build
from hildanext.data.chat_template import Example, render, set_template
from hildanext.data.sources.base import Report
from hildanext.data.sources.chat import CHATS
from hildanext.models.loading import tiny
from hildanext.tokenization import load_tokenizer

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = load_tokenizer(tiny.folder("diffusion"))
    set_template(found)
    return found


def weighted(*weights: Any) -> dict[str, Any]:
    """A conversation of questions and answers; a weight ... is not written."""
    turns = []
    for number, weight in enumerate(weights, 1):
        answer = {"role": "assistant", "content": f"a{number}"}
        turns += [{"role": "user", "content": f"q{number}"}, answer if weight is ... else {**answer, "weight": weight}]
    return {"messages": turns}


def read(folder: Path, *records: Any, **more: Any) -> tuple[list[Example], dict[str, int]]:
    path = write_jsonl(folder / "chat.jsonl", [*records, *[GOOD] * len(records)])
    report = Report()
    source = build("chat source", CHATS, {"name": "files", "path": str(path), **more})
    found = [example for example, _ in source.examples(report)]
    return found[: len(found) - len(records)], report.counts


def learnt(tokenizer: Any, example: Example) -> list[str]:
    """The texts that are learnt, row by row."""
    return [
        "".join(tokenizer.decode(row.ids[begin:end]) for begin, end in row.answers).replace(tokenizer.eos_token, "|")
        for row in render(tokenizer, example)
    ]


@pytest.mark.parametrize(
    ("weights", "texts", "shown"),
    [
        ((0, 1), "a2|", "a1"),
        ((0.0, ...), "a2|", "a1"),
        ((1, 0, 1), "a1|a3|", "a2"),
        ((1, 0), "a1|", None),
        ((None, 1.0), "a1|a2|", None),
    ],
)
def test_an_answer_of_weight_0_is_read_and_not_learnt(tmp_path: Path, tokenizer, weights, texts, shown):
    [example], counts = read(tmp_path, weighted(*weights))
    assert counts == {} and "".join(learnt(tokenizer, example)) == texts
    last = render(tokenizer, example)[-1].text
    assert (shown is None or shown in last) and last.rstrip().endswith(texts[-3:-1] + tokenizer.eos_token)


def test_weights_of_sharegpt_are_the_same(tmp_path: Path, tokenizer):
    turns = [("system", "S", None), ("human", "q", 0.0), ("gpt", "bad", 0.0), ("human", "r", 0.0), ("gpt", "good", 1.0)]
    record = {"conversations": [{"from": who, "value": text, "weight": weight} for who, text, weight in turns]}
    path = write_jsonl(tmp_path / "chat.jsonl", [record])
    [(example, _)] = build("chat source", CHATS, {"name": "files", "path": str(path)}).examples(Report())
    assert learnt(tokenizer, example) == ["good|"]


def with_turn(**more: Any) -> dict[str, Any]:
    user, answer = GOOD["messages"]
    return {"messages": [user, {**answer, **more}]}


REFUSED: dict[str, dict[str, Any]] = {
    "a weight that is neither 0 nor 1": with_turn(weight=0.5),
    "no answer is learnt": with_turn(weight=0),
    "causal_graph of an answer of weight 0": {**weighted(1, 0), "causal_graph": {}},
    "unknown key 'name' of a turn": with_turn(name="Lily"),
    "unknown key 'tool_calls' of a turn": with_turn(tool_calls=[{"id": "1"}]),
    "unknown key 'reasoning_content' of a turn": with_turn(reasoning_content="hm"),
    "unknown key 'loss' of a turn": with_turn(loss=False),
    "unread key 'tools' of a record": {**GOOD, "tools": [{"name": "f"}]},
    "unread key 'history' of a record": {**GOOD, "history": [["a", "b"]]},
    "a record of weight 0": {**GOOD, "weight": 0},
    "system twice": {"system": "One.", "messages": [{"role": "system", "content": "Two."}, *GOOD["messages"]]},
    "system is no string": {**GOOD, "system": ["One."]},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_change_the_meaning_is_refused_by_its_name(tmp_path: Path, kind: str):
    found, counts = read(tmp_path, REFUSED[kind])
    assert found == [] and counts == {kind: 1}


@pytest.mark.parametrize("weight", [True, "0", -1, 2, [0]])
def test_other_weights_are_refused(tmp_path: Path, weight: Any):
    assert read(tmp_path, with_turn(weight=weight))[1] == {"a weight that is neither 0 nor 1": 1}


@pytest.mark.parametrize(
    "record",
    [
        with_turn(refusal=None, tool_calls=None, annotations=[], audio=None, name="", id="m1", timestamp=3),
        {**GOOD, "tools": [], "history": None, "weight": 1, "source": "somewhere"},
    ],
)
def test_keys_that_say_nothing_are_taken(tmp_path: Path, record: dict[str, Any]):
    [example], counts = read(tmp_path, record)
    assert example.response == "Hello" and counts == {}


def test_keys_can_be_ignored_by_name(tmp_path: Path):
    record = {**with_turn(toxic=False, name="Lily"), "tools": ["f"]}
    [example], counts = read(tmp_path, record, ignore_keys=["toxic", "name", "tools"])
    assert example.response == "Hello" and counts == {}


def test_the_system_of_a_record_opens_its_conversation(tmp_path: Path):
    [example], counts = read(tmp_path, {**GOOD, "system": "Be brief."})
    assert [tuple(message) for message in example.messages][0] == ("system", "Be brief.") and counts == {}


def test_records_are_refused_one_by_one_and_the_others_stay(tmp_path: Path):
    half, digits = '{"messages": ["\\ud83d"]}', '{"n": ' + "9" * 5000 + "}"
    _, counts = read(tmp_path, half, digits, '{"a": 1, "a": 2}', '{"id": NaN, ' + '"messages": []}')
    kinds = ("half of a surrogate pair", "a number of thousands of digits", "a key twice in one object")
    assert counts == {**dict.fromkeys(kinds, 1), "no assistant turn": 1}


def test_an_array_goes_on_after_a_record_that_is_not_taken(tmp_path: Path):
    path = tmp_path / "chat.json"
    parts = ['{"prompt": "\\ud83d", "response": "b"}', '{"n": ' + "9" * 5000 + "}", '{"a": 1, "a": 1}']
    good = '{"prompt": "a", "response": "b"}'
    path.write_text("[" + ", ".join([good, *parts, good, good]) + "]")
    report = Report()
    found = list(build("chat source", CHATS, {"name": "files", "path": str(path)}).examples(report))
    assert [where for _, where in found] == [f"chat.json record {number}" for number in (1, 5, 6)]
    assert report.total == 3
