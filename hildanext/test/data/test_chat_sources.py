"""Conversations out of records: five shapes, files and hubs, and what happens to bad ones."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from corpus import write_jsonl
from hildanext.core.errors import ConfigError, DataError, UnknownChoice
from hildanext.core.registry import build
from hildanext.data.chat_template import Example
from hildanext.data.sources.base import CHUNK, Report
from hildanext.data.sources.chat import CHATS, SHAPES, StrictReport
from hildanext.data.sources.chat.arithmetic import Arithmetic
from hildanext.data.sources.chat.shapes import detect

RECORDS: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "messages": (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "2+2?"},
                {"role": "assistant", "content": "4"},
            ]
        },
        [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4")],
    ),
    "pair": ({"prompt": "2+2?", "response": "4"}, [("user", "2+2?"), ("assistant", "4")]),
    "gsm8k": (
        {"question": "2+2?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
        [("user", "2+2?"), ("assistant", "2+2=4\n#### 4")],
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "2 and 2", "output": "4"},
        [("user", "Add.\n\n2 and 2"), ("assistant", "4")],
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        [("user", "2+2?"), ("assistant", "4")],
    ),
}
"""One record of each of SHAPES, and its turns."""


def read(section: dict[str, Any], report: Report | None = None) -> list[Example]:
    source = build("chat source", CHATS, section)
    return [example for example, _ in source.examples(report if report is not None else Report())]


def turns(example: Example) -> list[tuple[str, str]]:
    return [tuple(message) for message in example.messages]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("named", [True, False])
def test_every_shape_is_read_by_name_and_told_from_the_first_record(tmp_path: Path, shape: str, named: bool):
    record, wanted = RECORDS[shape]
    assert detect(record) == shape
    path = write_jsonl(tmp_path / "chat.jsonl", [record, record])
    examples = read({"name": "files", "path": str(path), "shape": shape if named else "auto"})
    assert [turns(example) for example in examples] == [wanted, wanted]
    assert (examples[0].prompt, examples[0].response) == (wanted[-2][1], wanted[-1][1])


def test_the_shape_that_was_told_is_said(tmp_path: Path, caplog):
    path = write_jsonl(tmp_path / "chat.jsonl", [RECORDS["alpaca"][0]])
    with caplog.at_level("INFO"):
        read({"name": "files", "path": str(path)})
    assert "'alpaca'" in caplog.text and "chat.jsonl record 1" in caplog.text


def test_gsm8k_keeps_its_annotations_for_graphs_and_out_of_the_text(tmp_path: Path):
    path = write_jsonl(tmp_path / "chat.jsonl", [RECORDS["gsm8k"][0]])
    [example] = read({"name": "files", "path": str(path)})
    assert example.raw == "2+2=<<2+2=4>>4\n#### 4" and "<<" not in example.response


def test_the_trained_text_of_gsm8k_is_the_one_its_graphs_point_into(real_data: Path):
    from hildanext.data.causal_graphs.equations import without_annotations

    examples = read({"name": "files", "path": str(real_data / "gsm8k" / "test.jsonl")})
    assert len(examples) == 1319
    assert all(example.response == without_annotations(example.raw)[0] for example in examples)
    assert not any("<<" in example.response for example in examples)


@pytest.mark.parametrize("name", ["chat.jsonl", "chat.jsonl.gz", "chat.json"])
def test_lines_gzip_and_one_array_give_the_same(tmp_path: Path, name: str):
    records = [{"prompt": f"{number}?", "response": "x" * number} for number in range(1, 40)]
    path = tmp_path / name
    if name == "chat.json":
        path.write_text("\n [" + ",\n".join(json.dumps(record, indent=2) for record in records) + "\n]\n")
    else:
        write_jsonl(path, records)
    assert [example.response for example in read({"name": "files", "path": str(path)})] == [
        "x" * number for number in range(1, 40)
    ]


def test_an_array_larger_than_a_chunk_is_read_in_pieces(tmp_path: Path):
    records = [{"prompt": str(number), "response": "é" * (CHUNK // 3)} for number in range(8)]
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    assert [example.prompt for example in read({"name": "files", "path": str(path)})] == [str(n) for n in range(8)]


@pytest.mark.parametrize(
    ("text", "good", "kind"),
    [
        ('[{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}, {"prompt"', 2, "broken JSON"),
        ('[{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}', 2, "broken JSON"),
        ('[{"prompt": "a", "response": "b"}, 3]', 1, "not a JSON object"),
    ],
)
def test_an_array_that_breaks_off_keeps_what_came_before(tmp_path: Path, text: str, good: int, kind: str):
    path = tmp_path / "chat.json"
    path.write_text(text)
    report = Report()
    assert len(read({"name": "files", "path": str(path)}, report)) == good
    assert report.total == 1 and kind in report.summary()


BAD: dict[str, Any] = {
    "unknown role": {"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]},
    "empty turn": {"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "y"}]},
    "no assistant turn": {"messages": [{"role": "user", "content": "x"}]},
    "an answer before any user turn": {"messages": [{"role": "assistant", "content": "x"}]},
    "a turn without role": {"messages": [{"content": "x"}]},
    "a turn without content": {"messages": [{"role": "user"}]},
    "content is no string": {"messages": [{"role": "user", "content": ["x"]}]},
    "no turns": {"text": "x"},
    "not a JSON object": [1, 2],
    "broken JSON": '{"messages": [',
    "causal_graph is no object": {**RECORDS["messages"][0], "causal_graph": 3},
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_record_is_counted_with_its_place_and_the_rest_is_read(tmp_path: Path, kind: str):
    good = RECORDS["messages"][0]
    path = write_jsonl(tmp_path / "chat.jsonl", [good, good, BAD[kind], good])
    report = Report()
    assert len(read({"name": "files", "path": str(path)}, report)) == 3
    assert report.counts == {kind: 1} and "chat.jsonl record 3" in report.summary()


@pytest.mark.parametrize("kind", BAD)
def test_with_strict_the_first_bad_record_is_an_error_with_its_place(tmp_path: Path, kind: str):
    good = RECORDS["messages"][0]
    path = write_jsonl(tmp_path / "chat.jsonl", [good, BAD[kind], good])
    with pytest.raises(DataError, match=f"chat.jsonl record 2.*: {kind}"):
        read({"name": "files", "path": str(path), "strict": True}, StrictReport())


def test_a_source_that_is_mostly_bad_is_an_error(tmp_path: Path):
    good, bad = RECORDS["pair"][0], {"prompt": "x", "response": ""}
    read({"name": "files", "path": str(write_jsonl(tmp_path / "half.jsonl", [good, bad]))})
    path = write_jsonl(tmp_path / "chat.jsonl", [good, bad, bad])
    with pytest.raises(DataError, match="2 of 3 records cannot be used .2 empty turn"):
        read({"name": "files", "path": str(path)})


@pytest.mark.parametrize("rows", [[], ["{", "}"], [{"text": "x"}]])
def test_nothing_to_read_and_an_unknown_shape_are_errors(tmp_path: Path, rows: list[Any]):
    path = write_jsonl(tmp_path / "chat.jsonl", rows)
    with pytest.raises(DataError, match="no record could be read|cannot tell the shape of the first record .text"):
        read({"name": "files", "path": str(path)})


def test_fields_can_be_renamed(tmp_path: Path):
    path = write_jsonl(tmp_path / "chat.jsonl", [{"query": "2+2?", "reply": "4"}])
    examples = read({"name": "files", "path": str(path), "rename": {"prompt": "query", "response": "reply"}})
    assert turns(examples[0]) == [("user", "2+2?"), ("assistant", "4")]


def test_a_graph_and_an_id_come_along(tmp_path: Path):
    record = {"id": 7, **RECORDS["pair"][0], "causal_graph": {"version": 1}}
    [example] = read({"name": "files", "path": str(write_jsonl(tmp_path / "chat.jsonl", [record]))})
    assert example.id == "7" and example.graph == {"version": 1}


def test_a_data_set_of_the_hub_is_streamed(tmp_path: Path):
    """Through the loader `json`, which needs no hub."""
    path = write_jsonl(tmp_path / "chat.jsonl", [record for record, _ in [RECORDS["messages"]] * 3])
    examples = read({"name": "huggingface", "dataset": "json", "data_files": str(path)})
    assert [turns(example) for example in examples] == [RECORDS["messages"][1]] * 3


def test_sums_are_right_and_each_depends_on_its_number_alone():
    source = Arithmetic(count=200, steps=3, largest=20, seed=4)
    examples = [example for example, _ in source.examples(Report())]
    assert [e.messages for e in examples[:50]] == [
        e.messages for e, _ in Arithmetic(count=50, steps=3, largest=20, seed=4).examples(Report())
    ]
    for example in examples:
        *lines, final = example.response.splitlines()
        values = [math.nan]
        for line in lines:
            expression, result = line.split("=")
            left, sign, right = expression.partition("+") if "+" in expression else expression.partition("-")
            assert int(left) + int(sign + right) == int(result) and 0 <= int(result) <= 20
            assert math.isnan(values[-1]) or values[-1] == int(left)
            values.append(int(result))
        assert final == f"#### {values[-1]}" and len(lines) == 3
    assert len({example.id for example in examples}) > 190


@pytest.mark.parametrize(
    ("section", "error", "words"),
    [
        ({"name": "files"}, ConfigError, "path: it is missing"),
        ({"name": "filles", "path": "x"}, UnknownChoice, "did you mean 'files'"),
        ({"name": "files", "path": "nowhere.jsonl"}, DataError, "no such file"),
        ({"name": "files", "path": "x", "shape": "gsm"}, ConfigError, "shape"),
        ({"name": "arithmetic", "steps": 0}, ConfigError, "steps"),
    ],
)
def test_a_wrong_source_is_one_line(section: dict[str, Any], error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        read(section)


def test_a_poor_teacher_is_one_off_as_often_as_it_is_told_and_else_the_same():
    right, poor = (
        list(Arithmetic(count=400, largest=9, steps=1, seed=3, wrong=wrong).records(Report())) for wrong in (0.0, 0.75)
    )
    apart = []
    for one, other in zip(right, poor, strict=True):
        assert one.value["prompt"] == other.value["prompt"]
        values = [int(record.value["response"].split("#### ")[1]) for record in (one, other)]
        assert other.value["response"].startswith(one.value["response"].split("=")[0] + f"={values[1]}\n")
        apart.append(values[1] - values[0])
    assert set(apart) == {-1, 0, 1} and min(apart) >= -1
    assert 0.68 < sum(change != 0 for change in apart) / 400 < 0.82
    assert all(int(record.value["response"].split("#### ")[1]) >= 0 for record in poor)


def test_problems_with_answers_are_conversations_without_what_is_held_out():
    from hildanext.data.problems import PROBLEMS
    from hildanext.grading.rewards import REWARDS

    section = {"name": "countdown", "count": 200, "numbers": 2, "held_out": 0.3, "template": "Task: {prompt}"}
    every = read({"name": "problems", "problems": section})
    taught = read({"name": "problems", "problems": section, "side": "train"})
    split = build("problem set", PROBLEMS, section).split(build("reward", REWARDS, {"name": "countdown"}))
    assert len(every) == 200 and len(taught) == len(split.train) < 200
    asked = {problem.prompt for problem in split.held_out}
    assert not any(example.messages[0].content in asked for example in taught)
    assert taught[0].messages[0].content == split.train[0].prompt
    assert taught[0].messages[1].content == split.train[0].answer


def test_problems_without_answers_teach_nobody(tmp_path: Path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}])
    with pytest.raises(DataError, match="no right answer"):
        read({"name": "problems", "problems": {"name": "jsonl", "path": str(path)}})
