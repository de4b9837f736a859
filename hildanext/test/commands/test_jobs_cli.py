"""`hildanext jobs`, submissions of real stages, files of prompts, and twenty real jobs that are killed at random."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hildanext.cli import main
from hildanext.core.errors import ConfigError, DataError, HildaError
from hildanext.data.prompts import read_prompts
from hildanext.jobs import processes
from hildanext.recipe import execute
from hildanext.stages import STAGES
from hildanext.stages.answer_file import answer_file
from hildanext.stages.submission import FOLDER, NEEDS, check_submission, open_jobs

STORY = "Once upon a time there was a small boat. The boat liked the sea. One day the sea was very big.\n"


@pytest.fixture
def jobs(tmp_path, capsys):
    """Calls the verb; returns its exit code, what it printed, and its errors."""

    def call(*words):
        code = main(["jobs", *words, "--folder", str(tmp_path / "jobs")])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("Once upon a time\n\nLily had a dog\nOne day\n")
    return path


def generation(path, **more):
    return {"threads": 1, "generate": {"model": "tiny", "prompts_file": str(path), "max_new_tokens": 8, **more}}


def test_a_job_is_submitted_listed_shown_and_cancelled(jobs, prompts):
    flags = ["--set", "generate.model=tiny", "--set", f"generate.prompts_file={prompts}"]
    code, out, err = jobs("submit", "generate", *flags)
    assert code == 0 and out.startswith("queued 0001-generate") and "hildanext jobs work" in err
    assert "0001-generate" in jobs("list")[1] and "queued" in jobs("list", "--state", "queued")[1]
    code, out, _ = jobs("show", "0001-generate", "--json")
    shown = json.loads(out)
    assert shown["state"] == "queued" and shown["config"]["generate"]["model"] == "tiny" and shown["outcomes"] == {}
    assert "state   queued" in jobs("show", "0001-generate")[1].replace("state    ", "state ")
    assert jobs("cancel", "0001-generate")[1] == "0001-generate is cancelled\n"
    lines = jobs("events", "0001-generate")[1].splitlines()
    assert len(lines) == 2 and "queued" in lines[0] and "cancelled" in lines[1]
    first = json.loads(jobs("events", "0001-generate", "--json")[1].splitlines()[0])
    rest = jobs("events", "0001-generate", "--follow", "--after", str(first["id"]))[1]
    assert rest.splitlines() == lines[1:]
    assert "job.json" in jobs("artefacts", "0001-generate")[1] and jobs("log", "0001-generate")[:2] == (0, "")


def test_a_run_s_file_is_submitted_and_its_folder_is_the_job_s(jobs, tmp_path, prompts):
    (tmp_path / "run.json").write_text(json.dumps({"folder": "elsewhere", **generation(prompts)}))
    code, out, _ = jobs("submit", "generate", "--config", str(tmp_path / "run.json"), "--json")
    job = json.loads(out)
    assert code == 0 and json.loads((tmp_path / "jobs" / job["id"] / "job.json").read_text())["folder"] == job["folder"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["show", "0001-generat"], "did you mean 0001-generate?"),
        (["submit", "genrate"], "did you mean 'generate'"),
        (["submit", "generate", "--set", "generate.modle=tiny"], "unknown key 'modle'"),
        (["submit", "generate"], "generate: it needs model, and no stage before it makes one"),
        (["submit", "generate", "--set", "generate.model=tiny", "--set", "generate.prompts_file=none.txt"], "none.txt"),
        (["submit", "convert"], "wsd: it is missing, give a list"),
        (["submit", "bench", "--set", "bench.what=decode"], "bench: it needs model"),
        (["submit", "run"], "the run has no stages"),
        (["list", "--state", "done"], "unknown state 'done'"),
        (["list", "--limit", "0"], "limit 0"),
        (["work", "--limit", "0"], "--limit 0"),
    ],
)
def test_what_makes_no_sense_is_one_line(jobs, prompts, words, said):
    flags = ["--set", "generate.model=tiny", "--set", f"generate.prompts_file={prompts}"]
    assert jobs("submit", "generate", *flags)[0] == 0
    code, out, err = jobs(*words)
    assert code == 2 and not out and said in err and err.startswith("error: ") and err.count("\n") == 1
    assert len(json.loads(jobs("list", "--json")[1])) == 1


def test_the_flags_name_the_folder_that_the_room_has():
    from hildanext.commands.jobs import FOLDER as shown

    assert shown == FOLDER


def test_every_stage_can_be_submitted_or_is_known_to_need_something(tmp_path, prompts):
    assert set(NEEDS) < set(STAGES)
    with open_jobs(tmp_path) as service:
        for kind in STAGES:
            with contextlib.suppress(HildaError):
                service.submit(kind, {"prepare": {"source": {"name": "text", "path": str(prompts)}}})
        assert {job.kind for job in service.list()} == {"prepare"}


def test_a_report_may_be_about_another_run(tmp_path, prompts):
    folder = tmp_path / "run"
    samples = {"threads": 1, "generate": {"model": "tiny", "prompts": ["One day"], "max_new_tokens": 8}}
    execute({"folder": str(folder), **samples, "stages": [{"stage": "generate"}]}, STAGES)
    report = {"report": {"run": str(folder)}, "stages": [{"stage": "report"}]}
    page = Path(execute({"folder": str(tmp_path / "about"), **report}, STAGES)["report"]["report"])
    assert page == tmp_path / "about" / "report.html" and "One day" in page.read_text(encoding="utf-8")
    assert not (folder / "report.html").exists()
    with pytest.raises(DataError, match="no run's folder"):
        execute({"folder": str(tmp_path / "none"), **report, "report": {"run": str(tmp_path)}}, STAGES)


def test_a_job_writes_into_its_own_folder_alone(tmp_path):
    section = {"source": {"name": "text", "path": "x"}}
    for prepare in ({"out": "/elsewhere", **section}, {"train": {"out": "/elsewhere", **section}}):
        with pytest.raises(ConfigError, match="own folder"):
            check_submission({"folder": "", "prepare": prepare, "stages": [{"stage": "prepare"}]})


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_real_job_runs_under_work_and_ctrl_c_ends_that(tmp_path, prompts, jobs):
    with open_jobs(tmp_path / "jobs") as service:
        job = service.submit("generate", generation(prompts))
        words = [sys.executable, "-m", "hildanext.cli", "jobs", "work", "--folder", str(service.folder)]
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
            try:
                events = list(service.follow(job.id))
                process.send_signal(signal.SIGINT)
                assert "taking jobs from" in process.communicate(timeout=180)[1] and process.returncode == 0
            finally:
                process.kill()
        assert service.get(job.id).state == "succeeded", service.log(job.id)
        last = [event.data for event in events if event.kind == "progress"][-1]
        assert (last["done"], last["total"], last["unit"], last["stages_done"]) == (3, 3, "answers", 1)
        lines = service.artefact(job.id, "generate/answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["Once upon a time", "Lily had a dog", "One day"]
    assert "generate: answers" in jobs("show", job.id)[1] and "[generate] is done" in jobs("log", job.id)[1]


def answered(tmp_path, name, path, **more):
    execute({"folder": str(tmp_path / name), "stages": [{"stage": "generate"}], **generation(path, **more)}, STAGES)
    return tmp_path / name / "generate" / "answers.jsonl"


def test_answers_go_on_where_they_stopped_without_losing_or_repeating_a_line(tmp_path, prompts):
    prompts.write_text("There were dogs\n" * 7)
    section = {"batch_size": 3, "modes": ["S_MODE", "quality"], "decoder": {"temperature": 0.8}}
    whole = answered(tmp_path, "whole", prompts, **section).read_bytes()
    records = [json.loads(line) for line in whole.splitlines()]
    assert [(record["way"], record["index"]) for record in records] == [
        (m, n) for m in ("S_MODE", "Q_MODE") for n in range(7)
    ]
    assert len({record["text"] for record in records}) > 4  # each prompt has a seed of its own
    for kept in (1, 6, 10):
        path = answered(tmp_path, f"cut{kept}", prompts, **section)
        lines = whole.splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:kept]) + b'{"way": "S_MO')
        (path.parent.parent / "stages" / "generate.done.json").unlink()
        assert answered(tmp_path, f"cut{kept}", prompts, **section).read_bytes() == whole


def test_answers_to_other_prompts_are_not_mixed_in(tmp_path, prompts):
    answered(tmp_path, "run", prompts)
    (tmp_path / "run" / "stages" / "generate.done.json").unlink()
    prompts.write_text("Something else\n")
    with pytest.raises(DataError, match="is not what it was"):
        answered(tmp_path, "run", prompts)


def test_a_prompt_that_cannot_be_answered_does_not_end_the_others(tmp_path):
    path = tmp_path / "prompts.jsonl"
    long = "dog " * 5000
    path.write_text("\n".join(json.dumps(line) for line in ("One day", {"prompt": long, "id": 7}, {"prompt": "Two"})))
    records = [json.loads(line) for line in answered(tmp_path, "run", path).read_text().splitlines()]
    assert "context" in records[1]["error"] and records[1]["id"] == 7 and "text" not in records[1]
    assert records[0]["text"] and "text" in records[2] and [record["line"] for record in records] == [1, 2, 3]


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "no prompts"),
        ('"fine"\n{"prompt": 3}\n', "line 2: prompt is no text"),
        ("[1]\n", "line 1: one of prompt and messages"),
        ("{\n", "line 1: no JSON"),
        ('{"prompt": "a", "messages": []}\n', "line 1: one of"),
        ('{"messages": [{"role": "king", "content": "x"}]}\n', "line 1: messages"),
        ('{"prompt": "a", "id": [1]}\n', "line 1: id"),
        ('"\\ud800"\n', "line 1: half of a surrogate pair"),
        ("[" * 100_000, "line 1: no JSON"),
    ],
)
def test_a_file_of_prompts_is_refused_with_its_line(tmp_path, text, said):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(DataError, match=said):
        read_prompts(tmp_path / "p.jsonl")


def test_a_file_of_prompts_holds_texts_and_conversations(tmp_path):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    (tmp_path / "p.jsonl").write_text('"a"\n\n' + json.dumps({"messages": messages, "id": "x", "more": 1}) + "\n")
    first, second = read_prompts(tmp_path / "p.jsonl")
    assert first.as_json() == {"line": 1, "prompt": "a"}
    assert second.as_json() == {"line": 3, "id": "x", "messages": messages}
    (tmp_path / "p.txt").write_bytes(b"\xff\n")
    with pytest.raises(DataError, match="UTF-8"):
        read_prompts(tmp_path / "p.txt")


def test_conversations_without_a_template_are_refused(tmp_path, prompts):
    with pytest.raises(ConfigError, match="chat template"):
        answered(tmp_path, "run", prompts, chat=True)
    assert callable(answer_file)


def real_jobs(folder):
    """Twenty submissions of real stages: kind, configuration, and what each must come to."""
    text, asked = folder / "text.txt", folder / "prompts.txt"
    text.write_text(STORY * 400)
    asked.write_text("".join(f"Once there were {n} dogs\n" for n in range(12)))
    shared = {"threads": 1, "device": "cpu", "dtype": "fp32", "parent": "tiny"}
    source = {"source": {"name": "text", "path": str(text)}}
    prepare = {**shared, "prepare": {"train": source, "valid": source}}
    execute({"folder": str(folder / "data"), **prepare, "stages": [{"stage": "prepare"}]}, STAGES)
    data = {part: str(folder / "data" / "prepare" / part) for part in ("train", "valid")}
    wsd = [{"phase": "warmup", "block_size": 4, "tokens": 2560}, {"phase": "decay", "block_size": 8, "tokens": 2560}]
    convert = {
        **shared,
        "data": {**data, "sequence_length": 64, "pad_to_block": 8},
        "convert": {
            "block_size": 8, "wsd": wsd, "valid_rows": 2,
            "train": {"batch_size": 4, "precision": "no", "evaluate_every": 10, "checkpoint_every": 3},
        },
    }  # fmt: skip
    generate = {**shared, **generation(asked, batch_size=2, max_new_tokens=32)}
    bench = {**shared, "bench": {"model": "tiny", "decode": {"prompt_tokens": 8, "new_tokens": 16, "repeats": 2}}}
    both = {**convert, **generation(asked, batch_size=2, max_new_tokens=8), "stages": []}
    del both["generate"]["model"]
    both["stages"] = [{"stage": "convert"}, {"stage": "generate"}]
    lacking = {**shared, "generate": {"model": str(folder / "no-model"), "prompts_file": str(asked)}}
    endless = {**convert, "convert": {**convert["convert"], "wsd": [{**wsd[1], "tokens": 10_000_000}]}}
    rows = [("prepare", prepare, "succeeded")] * 4 + [("convert", convert, "succeeded")] * 4
    rows += [("generate", generate, "succeeded")] * 5 + [("bench", bench, "succeeded")] * 2
    rows += (
        [("run", both, "succeeded")] + [("generate", lacking, "failed")] * 2 + [("convert", endless, "cancelled")] * 2
    )
    return rows


def what_came_of_it(folder):
    """The parts of a run's folder that do not depend on the clock."""
    contents = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.name == "metrics.jsonl" and "generate" not in name:
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            timed = ("seconds", "tokens_per_second")
            contents[name] = [{key: value for key, value in line.items() if key not in timed} for line in lines]
        elif path.name == "answers.jsonl" or path.suffix in (".safetensors", ".bin", ".npy") and "state" not in name:
            contents[name] = path.read_bytes()
    return contents


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_twenty_real_jobs_end_right_and_whole_whatever_is_killed(tmp_path, capsys):
    dice = random.Random(int(os.environ.get("HILDA_DICE", "4")))
    rows = real_jobs(tmp_path)
    words = [sys.executable, "-m", "hildanext.cli", "jobs", "work", "--limit", "2", "--folder", str(tmp_path / "jobs")]

    def supervise():
        return subprocess.Popen(words, stderr=subprocess.DEVNULL, start_new_session=True)

    kills, hit = {"supervisor": 0, "worker": 0, "command": 0}, {}
    began = time.monotonic()
    with open_jobs(tmp_path / "jobs") as service:
        jobs = [(service.submit(kind, config), config, state) for kind, config, state in dice.sample(rows, len(rows))]
        process = supervise()
        try:
            while not all(service.get(job.id).over for job, _, _ in jobs):
                assert time.monotonic() - began < 2400, service.counts()
                time.sleep(dice.uniform(0.5, 4.0))
                for job, _, state in jobs:
                    if (
                        state == "cancelled"
                        and (service.get(job.id).progress.step or 0) > 5
                        and not service.get(job.id).over
                    ):
                        service.cancel(job.id)
                running = [job.id for job in service.list(1000, state="running") if hit.get(job.id, 0) < 3]
                victim = dice.choice(("supervisor", "worker", "command"))
                if victim == "supervisor":
                    process.kill()
                    process.wait()
                    time.sleep(dice.uniform(0.0, 2.0))
                    process = supervise()
                    kills[victim] += 1
                elif running:
                    row = service.store.row(dice.choice(running))
                    column, born = ("pid", "born") if victim == "worker" else ("child", "child_born")
                    if processes.alive(row[column], row[born]):
                        os.kill(row[column], signal.SIGKILL)
                        kills[victim] += 1
                        hit[row["id"]] = hit.get(row["id"], 0) + 1
        finally:
            process.kill()
            process.wait()
        seconds = time.monotonic() - began
        ends = [service.get(job.id) for job, _, _ in jobs]
        assert [(end.id, end.state) for end in ends] == [(job.id, state) for job, _, state in jobs]
        assert all("no-model" in end.error for end in ends if end.state == "failed")
        alone = {}
        for job, config, state in jobs:
            if state == "succeeded":
                key = json.dumps(config)
                if key not in alone:
                    recipe = service.recipe(job.kind, config)
                    folder = tmp_path / f"alone-{len(alone)}"
                    execute({**recipe, "folder": str(folder)}, STAGES)
                    alone[key] = what_came_of_it(folder)
                came = what_came_of_it(job.folder)
                assert list(came) == list(alone[key]) and came == alone[key], job.id
                assert set(service.outcomes(job.id)) == {
                    stage["stage"] for stage in service.recipe(job.kind, config)["stages"]
                }
        attempts = sum(end.attempts for end in ends)
    with capsys.disabled():
        print(f"\n20 jobs, {attempts} attempts, kills {kills}, {len(hit)} jobs hit, {seconds:.0f} s")
    assert sum(kills.values()) >= 20 and all(kills.values())
