"""Input of others at every door: records are counted and skipped by line, the rest is one line and exit code 2."""

import json
from pathlib import Path
from typing import Any

import pytest

from hildanext.cli import main

KINDS = {
    "half of a surrogate pair": b'"x \\ud83d"',
    "a number of thousands of digits": b"9" * 5000,
    "a key twice in one object": b'{"a": 1, "a": 2}',
    "broken JSON": b"[" * 100_000,
    "bad UTF-8": b'"\xff"',
}
"""What a record, a prompt or a configuration holds in a field that nobody reads, by the name of what is wrong."""
SAID = {"broken JSON": "nested too deeply", "bad UTF-8": "UTF-8"}

ROWS: dict[str, dict[str, Any]] = {
    "prepare": {"text": "The dog ran."},
    "sft": {"prompt": "Hi", "response": "The dog ran."},
    "eval": {"question": "1+1?", "answer": "#### 2"},
}


def with_field(row: dict[str, Any], value: bytes) -> bytes:
    return json.dumps(row).encode()[:-1] + b', "more": ' + value + b"}\n"


def arguments(verb: str, path: Path, out: Path) -> list[str]:
    if verb == "prepare":
        return ["prepare", "--source", "jsonl", "--path", str(path), "--tokenizer", "tiny", "--out", str(out)]
    if verb == "sft":
        train = json.dumps({"name": "files", "path": str(path)})
        sets = [f"chat.train={train}", "chat.valid_share=0.5", "sft.model=tiny", "chat.sequence_length=64"]
        return ["sft", "--data-only", "--out", str(out), *(word for one in sets for word in ("--set", one))]
    few = ["--set", "eval.quality.tasks.gsm8k.few_shot=0", "--set", "eval.quality.tasks.gsm8k.max_new_tokens=8"]
    return ["eval", "--model", "tiny", "--parent", "none", "--tasks", f"gsm8k={path}", "--out", str(out), *few]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", ["prepare", "sft"])
def test_a_bad_record_is_counted_and_skipped(tmp_path: Path, capsys, caplog, verb: str, kind: str):
    good = b"".join(json.dumps({**ROWS[verb], "id": number}).encode() + b"\n" for number in range(8))
    (tmp_path / "a.jsonl").write_bytes(good + with_field(ROWS[verb], KINDS[kind]))
    assert main(arguments(verb, tmp_path / "a.jsonl", tmp_path / "out")) == 0
    said = capsys.readouterr().out + caplog.text
    assert f"1 {kind}" in said and f"a.jsonl record 9: {kind}" in said


def test_a_bad_row_of_a_benchmark_is_counted_beside_its_score(tmp_path: Path, capsys, caplog):
    good = json.dumps(ROWS["eval"]).encode() + b"\n"
    bad = with_field(ROWS["eval"], KINDS["half of a surrogate pair"])
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + good + bad + good)
    assert main(arguments("eval", tmp_path / "a.jsonl", tmp_path / "out")) == 0
    assert "rows left out 1" in " ".join(capsys.readouterr().out.split())
    assert "a.jsonl line 2: half of a surrogate pair" in caplog.text
    [task] = json.loads((tmp_path / "out" / "quality.json").read_text())["tasks"]
    assert task["facts"]["rows left out"] == 1 and task["ways"][0]["scores"]["strict"]["items"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_benchmark_without_a_row_that_can_be_read_is_refused(tmp_path: Path, capsys, kind: str):
    (tmp_path / "a.jsonl").write_bytes(with_field(ROWS["eval"], KINDS[kind]))
    assert main(arguments("eval", tmp_path / "a.jsonl", tmp_path / "out")) == 2
    assert_one_line(capsys, SAID.get(kind, kind))


@pytest.mark.parametrize("ending", ["", "}", '{"question": "a"'])
def test_an_array_of_rows_that_is_cut_off_is_refused(tmp_path: Path, capsys, ending: str):
    (tmp_path / "a.json").write_text("[" + json.dumps(ROWS["eval"]) + ", " + ending)
    assert main(arguments("eval", tmp_path / "a.json", tmp_path / "out")) == 2
    assert_one_line(capsys, "broken JSON")


CONFIGS = {
    "generate": ["generate", "--prompt", "a", "--config"],
    "prepare": ["prepare", "--config"],
    "convert": ["convert", "--out", "out", "--config"],
    "sft": ["sft", "--out", "out", "--config"],
    "eval": ["eval", "--config"],
    "bench": ["bench", "decode", "--config"],
    "run": ["run"],
    "check": ["check"],
    "jobs submit": ["jobs", "submit", "convert", "--folder", "jobs", "--config"],
}


@pytest.mark.parametrize("verb", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_configuration_is_one_line(tmp_path: Path, capsys, monkeypatch, verb: str, kind: str):
    monkeypatch.chdir(tmp_path)
    Path("c.json").write_bytes(with_field({"name": "x"}, KINDS[kind]))
    assert main([*CONFIGS[verb], "c.json"]) == 2
    assert_one_line(capsys, kind)
    assert [path for path in Path().rglob("*") if path.is_file() and path.name != "jobs.sqlite"] == [Path("c.json")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("door", ["--batch", "job"])
def test_a_bad_prompt_is_one_line(tmp_path: Path, capsys, door: str, kind: str):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'"fine"\n' + with_field({"prompt": "a"}, KINDS[kind]))
    job = ["jobs", "submit", "generate", "--folder", str(tmp_path / "jobs"), "--set", "generate.model=tiny"]
    flags = (
        ["generate", "--batch", str(path)] if door == "--batch" else [*job, "--set", f"generate.prompts_file={path}"]
    )
    assert main(flags) == 2
    assert_one_line(capsys, SAID.get(kind, kind))


@pytest.mark.parametrize(
    "flags",
    [
        ["generate", "--prompt", "a \udcff"],
        ["generate", "--chat", "--system", "\udcff", "--prompt", "a"],
        ["generate", "--stop", "\udcff", "--prompt", "a"],
        ["generate", "--server", "http://127.0.0.1:9", "--prompt", "\udcff"],
        ["prepare", "--set", "prepare.out=\udcff"],
        ["jobs", "submit", "generate", "--set", 'generate.prompts=["\udcff"]'],
    ],
)
def test_an_argument_that_is_no_utf_8_is_one_line(capsys, flags: list[str]):
    assert main(flags) == 2
    assert_one_line(capsys, "is no UTF-8")


def test_a_batch_may_hold_conversations_and_says_which_lines_were_blank(tmp_path: Path, capsys, caplog):
    lines = ["plain", {"id": "x", "prompt": "The dog\u2028"}, {"messages": [{"role": "user", "content": "Hi"}]}]
    (tmp_path / "p.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    flags = ["--batch", str(tmp_path / "p.jsonl"), "--max-new-tokens", "4", "--json"]
    assert main(["generate", *flags]) == 2
    assert_one_line(capsys, "has no chat template")
    (tmp_path / "p.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines[:2]))
    assert main(["generate", *flags]) == 0
    first, second = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (first["prompt"], second["prompt"], second["id"]) == ("plain", "The dog\u2028", "x")
    assert "blank lines skipped: 1" in caplog.text


def assert_one_line(capsys, said: str) -> None:
    printed = capsys.readouterr()
    [line] = [line for line in printed.err.splitlines() if line]
    assert line.startswith("error: ") and said in line and len(line) < 600 and "Traceback" not in printed.out
