"""The jobs' room: states, workers and supervisors that are killed, events, artefacts. The command is a small script."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from hildanext.core.errors import CheckpointError, ConfigError, HildaError, StorageError, UnknownChoice
from hildanext.jobs import processes
from hildanext.jobs.base import ArtefactError, JobConflict, JobsFull, UnknownJob
from hildanext.jobs.progress import look, progress_mark
from hildanext.jobs.service import JobService
from hildanext.jobs.store import JobStore

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

SCRIPT = """
import json, os, pathlib, signal, subprocess, sys, time
run = json.load(open(sys.argv[-1]))
folder, how = pathlib.Path(run["folder"]), run.get("count", {})
if how.get("deaf"):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if how["deaf"] == "quite":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
if how.get("child"):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (folder / "child.txt").write_text(str(child.pid))
print("begins in", os.getcwd(), flush=True)
if how.get("kill"):
    os.kill(os.getpid(), how["kill"])
out = folder / "lines.txt"
n = len(out.read_text().splitlines()) if out.exists() else 0
while n < how.get("lines", 3):
    while n == how.get("hold") and not (folder / "go").exists():
        time.sleep(0.01)
    with open(out, "a") as file:
        file.write(f"{n}\\n")
    n += 1
    time.sleep(how.get("pause", 0.0))
if how.get("fail"):
    print("error: the well is dry: dig deeper", file=sys.stderr)
    sys.exit(2)
"""
COMMAND = (sys.executable, "-c", SCRIPT)


def refuse(run):
    if "typo" in run:
        raise ConfigError("unknown key 'typo'")


def open_service(folder, **more):
    return JobService(folder, kinds={"count": "", "other": ""}, check=refuse, command=COMMAND, **more)


@pytest.fixture
def service(tmp_path):
    with open_service(tmp_path / "jobs") as opened:
        yield opened
        for job in opened.list(state="running"):
            row = opened.store.row(job.id)
            processes.end_group(row["pid"] or -1, row["born"], row["child"], row["child_born"])


def wait(service, job, *states, seconds=60.0):
    until = time.monotonic() + seconds
    while (current := service.get(job.id)).state not in states:
        assert time.monotonic() < until, f"{current} after {seconds} s, log: {service.log(job.id)}"
        time.sleep(0.05)
    return current


def wait_until(holds, seconds=60.0):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


def begun(service, job):
    """The job, once its command has written something."""
    wait(service, job, "running")
    wait_until(lambda: (job.folder / "lines.txt").exists())
    wait_until(lambda: service.store.row(job.id)["child"] is not None)
    return service.get(job.id)


def let_go(job):
    """Let a command go on behind the line where it holds."""
    (job.folder / "go").touch()


def states(service, job):
    return [event.data["state"] for event in service.events(job.id) if event.kind == "state"]


def numbers(count):
    return "".join(f"{n}\n" for n in range(count))


def test_a_job_runs_in_a_folder_of_its_own_and_succeeds(service):
    job = service.submit("count", {"count": {"lines": 4}, "folder": "/elsewhere", "seed": 3})
    assert job.state == "queued" and job.attempts == 0 and job.folder.parent == service.folder
    service.start()
    done = wait(service, job, "succeeded")
    assert (job.folder / "lines.txt").read_text() == numbers(4)
    recipe = json.loads((job.folder / "job.json").read_text())
    assert recipe["folder"] == str(job.folder) and recipe["stages"] == [{"stage": "count"}] and recipe["seed"] == 3
    assert done.exit_code == 0 and done.error is None and done.attempts == 1 and done.pid is None
    assert done.created <= done.started <= done.ended
    assert states(service, job) == ["queued", "running", "succeeded"]
    assert f"begins in {Path.cwd()}" in service.log(job.id)


def test_a_failed_job_says_why_in_one_line(service):
    job = service.submit("count", {"count": {"fail": True}})
    service.start()
    done = wait(service, job, "failed")
    assert done.error == "the well is dry: dig deeper" and done.exit_code == 2
    assert service.events(job.id)[-1].data == {"state": "failed", "attempt": 1, "error": done.error, "exit_code": 2}


@posix
def test_a_crash_fails_and_names_its_signal(service):
    job = service.submit("count", {"count": {"kill": int(signal.SIGSEGV)}})
    service.start()
    assert wait(service, job, "failed").error.startswith("SIGSEGV")


def test_at_most_so_many_run_at_once_over_all_supervisors(service):
    with open_service(service.folder, limit=2) as other:
        service.supervisor.limit = 2
        jobs = [service.submit("count", {"count": {"lines": 3, "pause": 0.1}}) for _ in range(5)]
        service.start()
        other.start()
        most = 0
        while not all(service.get(job.id).over for job in jobs):
            most = max(most, len(service.list(state="running")))
            time.sleep(0.02)
    assert most == 2
    for job in jobs:
        assert states(service, job) == ["queued", "running", "succeeded"]
        assert (job.folder / "lines.txt").read_text() == numbers(3)


def test_two_supervisors_never_claim_one_job(tmp_path):
    stores = [JobStore(tmp_path / "jobs") for _ in range(4)]
    for _ in range(40):
        stores[0].add("count", {}, tmp_path, 100, lambda name: None)
    claimed: list[str] = []

    def claim(store):
        while (row := store.claim(100, 1, "b")) is not None:
            claimed.append(row["id"])

    threads = [threading.Thread(target=claim, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == 40 == len(set(claimed))
    for store in stores:
        store.close()


def test_a_worker_that_comes_too_late_does_nothing(service):
    job = service.submit("count", {"count": {"lines": 6, "hold": 3}})
    first = service.store.claim(1, 1, "no such process")
    service.supervisor.tick()  # the claimer is dead: interrupted, queued and claimed anew
    assert first["attempts"] == 1
    begun(service, job)
    command = [sys.executable, "-m", "hildanext.jobs.worker", str(service.folder), job.id, "1", "1", *COMMAND]
    assert subprocess.run(command, timeout=60).returncode == 1
    assert service.get(job.id).state == "running"
    let_go(job)
    wait_until(lambda: (service.supervisor.tick(), service.get(job.id).over)[1])
    assert (job.folder / "lines.txt").read_text() == numbers(6)
    assert states(service, job) == ["queued", "running", "interrupted", "queued", "running", "succeeded"]


@posix
def test_a_killed_command_is_interrupted_and_goes_on_where_it_was(service):
    job = service.submit("count", {"count": {"lines": 6, "hold": 3}})
    service.start()
    begun(service, job)
    os.kill(service.store.row(job.id)["child"], signal.SIGKILL)
    let_go(job)
    wait(service, job, "succeeded")
    assert states(service, job) == ["queued", "running", "interrupted", "queued", "running", "succeeded"]
    assert "SIGKILL" in next(e.data["error"] for e in service.events(job.id) if e.data.get("state") == "interrupted")
    assert (job.folder / "lines.txt").read_text() == numbers(6)


@posix
def test_a_killed_worker_leaves_nothing_running_before_the_job_goes_on(service):
    job = service.submit("count", {"count": {"lines": 6, "hold": 3, "child": True}})
    service.start()
    begun(service, job)
    row, grandchild = service.store.row(job.id), int((job.folder / "child.txt").read_text())
    assert processes.birth(grandchild) is not None
    os.kill(row["pid"], signal.SIGKILL)
    wait_until(lambda: service.get(job.id).attempts == 2)
    assert processes.birth(row["child"]) is None and processes.birth(grandchild) is None
    let_go(job)
    wait(service, job, "succeeded")
    assert (job.folder / "lines.txt").read_text() == numbers(6)


@posix
def test_what_a_command_leaves_running_ends_with_its_job(service):
    job = service.submit("count", {"count": {"child": True}})
    service.start()
    wait(service, job, "succeeded")
    assert processes.birth(int((job.folder / "child.txt").read_text())) is None


@posix
def test_a_number_that_went_to_a_stranger_is_not_taken_for_the_worker(service):
    job = service.submit("count", {"count": {"lines": 1}})
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        service.store.claim(1, 1, "nobody")
        assert service.store.register(job.id, 1, stranger.pid, processes.birth(stranger.pid) + "0")
        service.supervisor.tick()
        assert stranger.poll() is None
        wait_until(lambda: (service.supervisor.tick(), service.get(job.id).over)[1])
        assert service.get(job.id).state == "succeeded" and service.get(job.id).attempts == 2
    finally:
        stranger.kill()
        stranger.wait()


SUPERVISE = """
import sys, time
sys.path.insert(0, sys.argv[1])
import test_jobs
service = test_jobs.open_service(sys.argv[2])
service.start()
time.sleep(600)
"""


@contextlib.contextmanager
def another_supervisor(folder):
    words = [sys.executable, "-c", SUPERVISE, str(Path(__file__).parent), str(folder)]
    process = subprocess.Popen(words, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@posix
def test_a_job_outlives_its_supervisor_and_is_found_again(service):
    job = service.submit("count", {"count": {"lines": 6, "hold": 3}})
    with another_supervisor(service.folder) as process:
        pid = begun(service, job).pid
        assert service.supervised()
        process.kill()
        process.wait()
        assert not service.supervised()
    assert processes.birth(pid) is not None
    service.start()
    let_go(job)
    wait(service, job, "succeeded")
    assert states(service, job) == ["queued", "running", "succeeded"] and service.get(job.id).attempts == 1


@posix
def test_a_job_that_ends_while_nobody_watches_is_told_all_the_same(service):
    job = service.submit("count", {"count": {"lines": 4, "hold": 2}})
    with another_supervisor(service.folder):
        begun(service, job)
    let_go(job)
    assert wait(service, job, "succeeded").exit_code == 0


@posix
def test_interruptions_that_come_to_nothing_end(tmp_path):
    with open_service(tmp_path, resumes=2) as service:
        job = service.submit("count", {"count": {"kill": int(signal.SIGKILL)}})
        service.start()
        done = wait(service, job, "failed")
        assert done.attempts == 3 and "3 times" in done.error and "SIGKILL" in done.error


@pytest.mark.parametrize("full", ["its folder", "the table"])
def test_a_full_disk_at_submission_leaves_nothing_and_is_the_server_s_507(service, full, monkeypatch):
    kept = service.submit("count", {})
    before = sorted(path.name for path in service.folder.iterdir())
    if full == "its folder":

        def fsync(handle):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("hildanext.core.run_dir.os.fsync", fsync)
    else:
        pages = service.store._base.execute("PRAGMA page_count").fetchone()[0]
        service.store._base.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StorageError) as caught:
        service.submit("count", {"count": {"filler": "x" * 100_000}})
    assert caught.value.status == 507
    assert ("out of disk" if full == "its folder" else "full") in caught.value.message
    assert sorted(path.name for path in service.folder.iterdir()) == before
    assert [job.id for job in service.list()] == [kept.id]
    monkeypatch.undo()
    service.store._base.execute("PRAGMA max_page_count = 1000000")
    assert service.submit("count", {}).id == "0002-count"


def test_a_waiting_job_is_cancelled_at_once_and_once_more_is_no_error(service):
    job = service.submit("count", {})
    assert service.cancel(job.id).state == "cancelled" == service.cancel(job.id).state
    service.start()
    other = service.submit("count", {})
    wait(service, other, "succeeded")
    assert states(service, job) == ["queued", "cancelled"] and not (job.folder / "lines.txt").exists()
    with pytest.raises(JobConflict, match="has succeeded"):
        service.cancel(other.id)


@posix
@pytest.mark.parametrize("deaf, ended_by", [(None, "SIGINT"), ("somewhat", "SIGTERM"), ("quite", "SIGKILL")])
def test_a_running_job_is_asked_to_stop_harder_and_harder(tmp_path, deaf, ended_by):
    with open_service(tmp_path, grace_seconds=0.6) as service:
        job = service.submit("count", {"count": {"lines": 10_000, "pause": 0.05, "deaf": deaf, "child": True}})
        service.start()
        begun(service, job)
        row, grandchild = service.store.row(job.id), int((job.folder / "child.txt").read_text())
        assert service.cancel(job.id).cancelling
        done = wait(service, job, "cancelled")
        assert done.exit_code == -getattr(signal, ended_by) and done.error is None and done.ended is not None
        assert processes.birth(row["child"]) is None and processes.birth(grandchild) is None
        assert states(service, job) == ["queued", "running", "running", "cancelled"]


@posix
def test_a_cancelled_job_whose_worker_dies_is_cancelled(service):
    job = service.submit("count", {"count": {"lines": 1000, "pause": 0.05, "deaf": "quite"}})
    service.start()
    begun(service, job)
    pid = service.store.row(job.id)["pid"]
    service.cancel(job.id)
    os.kill(pid, signal.SIGKILL)
    wait(service, job, "cancelled")
    assert "interrupted" not in states(service, job)


@posix
def test_a_job_is_cancelled_while_nobody_supervises(service):
    job = service.submit("count", {"count": {"lines": 1000, "pause": 0.05}})
    with another_supervisor(service.folder):
        begun(service, job)
    service.cancel(job.id)
    wait(service, job, "cancelled")


def test_events_have_growing_ids_and_go_on_after_any_of_them(service):
    first, second = service.submit("count", {"count": {"lines": 2}}), service.submit("count", {})
    service.start()
    followed = list(service.follow(first.id))
    assert [event.kind for event in followed if event.kind == "log"] and followed[-1].data["state"] == "succeeded"
    ids = [event.id for event in followed]
    assert ids == sorted(set(ids)) and followed == service.events(first.id)
    for place in (0, 1, len(ids) - 1):
        assert list(service.follow(first.id, after=ids[place])) == followed[place + 1 :]
        assert service.events(first.id, after=ids[place], limit=1) == followed[place + 1 : place + 2]
    list(service.follow(second.id))
    assert not set(ids) & {event.id for event in service.events(second.id)}
    json.dumps([event.as_json() for event in followed], allow_nan=False)


def test_follow_can_be_stopped(service):
    job, stopped = service.submit("count", {}), threading.Event()
    stopped.set()
    assert [event.data["state"] for event in service.follow(job.id, stopped=stopped)] == ["queued"]


def metrics(*steps, kind="train", **more):
    lines = ({"kind": kind, "step": n, "tokens": 100 * n, "loss": 1 / n, **more} for n in steps)
    return "".join(json.dumps(line) + "\n" for line in lines)


def a_run(folder, *stages):
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps({"stages": [{"stage": name} for name in stages]}))
    return folder


def metrics_of(events):
    return [(data["kind"], data["step"]) for kind, data in events if kind == "metric"]


def test_metrics_are_told_once_also_where_a_resumed_run_writes_them_again(tmp_path):
    folder, cursors = a_run(tmp_path / "job", "convert"), {}
    path = folder / "convert" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text(metrics(1, 2) + metrics(2, kind="eval") + metrics(3, 4) + '{"kind": "tr')
    assert metrics_of(look(folder, cursors)[0]) == [("train", 2), ("eval", 2), ("train", 4)]
    assert metrics_of(look(folder, cursors)[0]) == []
    fresh = path.with_suffix(".fresh")  # as MetricLog.truncate_after does
    fresh.write_text(metrics(1, 2) + metrics(2, kind="eval"))
    fresh.replace(path)
    assert metrics_of(look(folder, json.loads(json.dumps(cursors)))[0]) == []
    with path.open("a") as file:
        file.write(metrics(3) + metrics(4) + metrics(4, kind="eval") + metrics(5))
    assert metrics_of(look(folder, cursors)[0]) == [("eval", 4), ("train", 5)]


def test_numbers_that_json_does_not_know_are_left_open(tmp_path):
    folder = a_run(tmp_path / "job", "convert")
    (folder / "convert").mkdir()
    (folder / "convert" / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": NaN}\n[1]\nnothing\n')
    events, progress = look(folder, {})
    assert events == [("metric", {"stage": "convert", "kind": "train", "step": 1, "loss": None})]
    assert progress.loss is None and progress.step == 1


def test_progress_tells_stage_step_tokens_and_the_time_left(tmp_path):
    folder = a_run(tmp_path / "job", "prepare", "convert")
    (folder / "stages").mkdir()
    (folder / "convert").mkdir()
    (folder / "convert" / "metrics.jsonl").write_text(metrics(1, 2, total_tokens=1000, tokens_per_second=50.0))
    assert look(folder, {})[1].stage == "prepare"
    (folder / "stages" / "prepare.done.json").write_text("{}")
    progress = look(folder, {})[1]
    assert (progress.stage, progress.stages_done, progress.stages, progress.step) == ("convert", 1, 2, 2)
    assert (progress.done, progress.total, progress.unit, progress.loss) == (200, 1000, "tokens", 0.5)
    assert progress.eta_seconds == 16.0


def test_a_flood_of_log_lines_is_cut_and_says_so(tmp_path):
    folder, cursors = a_run(tmp_path / "job", "x"), {}
    (folder / "job.log").write_text("".join(f"line {n}\n" for n in range(1000)) + "half")
    lines = [data["line"] for kind, data in look(folder, cursors)[0]]
    assert len(lines) == 201 and "800 lines" in lines[0] and lines[-1] == "line 999"
    with (folder / "job.log").open("ab") as file:
        file.write(b" a line\n 10%\r 20%\r100%\n" + b"x" * 5000 + b"\n\xff\n")
    assert [data["line"] for kind, data in look(folder, cursors)[0]] == ["half a line", "100%", "x" * 2000, "\ufffd"]


def test_the_mark_of_progress_changes_with_what_is_kept_alone(tmp_path):
    folder = a_run(tmp_path / "job", "convert")
    (folder / "convert" / "state").mkdir(parents=True)
    (folder / "convert" / "state" / "counters.json").write_text("1")
    before = progress_mark(folder)
    for name in ("job.log", "run.json", "convert/metrics.jsonl", "convert/state.tmp-3"):
        (folder / name).write_text("more")
    assert progress_mark(folder) == before
    os.utime(folder / "convert" / "state" / "counters.json", (1, 1))
    again = progress_mark(folder)
    (folder / "answers.jsonl").write_text("{}\n")
    assert len({before, again, progress_mark(folder)}) == 3


@pytest.mark.parametrize(
    "kind, config, error, word",
    [
        ("cuont", {}, UnknownChoice, "did you mean 'count'"),
        ("../up", {}, UnknownChoice, "unknown kind"),
        ("count", {"typo": 1}, ConfigError, "typo"),
        ("count", {"stages": [{"stage": "count"}]}, ConfigError, "submit it as 'run'"),
        ("count", {"count": {"tau": float("nan")}}, ConfigError, "no JSON"),
        ("count", {"count": {"x": "y" * (1 << 20)}}, ConfigError, "too large"),
        ("count", {"count": {1, 2}}, ConfigError, "no JSON"),
    ],
)
def test_a_submission_that_makes_no_sense_is_refused_before_it_is_queued(service, kind, config, error, word):
    with pytest.raises(error, match=word):
        service.submit(kind, config)
    assert service.list() == [] and [path.name for path in service.folder.iterdir() if path.is_dir()] == []


def test_a_whole_recipe_keeps_its_stages(service):
    job = service.submit("run", {"stages": [{"stage": "count"}, {"stage": "other", "as": "two"}]})
    assert [stage["stage"] for stage in json.loads((job.folder / "job.json").read_text())["stages"]] == [
        "count",
        "other",
    ]


def test_too_many_waiting_jobs_are_refused(tmp_path):
    with open_service(tmp_path, waiting=2) as service:
        service.submit("count", {})
        service.submit("count", {})
        with pytest.raises(JobsFull) as refused:
            service.submit("count", {})
        assert refused.value.status == 503 and refused.value.retry_after > 0


def test_jobs_are_listed_the_newest_first_in_pages(service):
    ids = [service.submit("count", {}).id for _ in range(5)]
    assert [job.id for job in service.list()] == ids[::-1]
    assert [job.id for job in service.list(limit=2, before=ids[3])] == [ids[2], ids[1]]
    service.cancel(ids[1])
    assert [job.id for job in service.list(state="cancelled")] == [ids[1]]
    assert service.counts() == {
        "queued": 4,
        "running": 0,
        "succeeded": 0,
        "failed": 0,
        "cancelled": 1,
        "interrupted": 0,
    }
    with pytest.raises(UnknownChoice, match="state"):
        service.list(state="done")
    with pytest.raises(ConfigError, match="limit"):
        service.list(limit=0)


@pytest.mark.parametrize(
    "name", ["0001-cuont", "", "../0001-count", "0001-count\0", "\ud800", "x" * 100_000, "0001-count/"]
)
@pytest.mark.parametrize("what", ["get", "cancel", "events", "log", "artefacts", "outcomes"])
def test_an_unknown_job_is_an_error_with_near_names(service, name, what):
    service.submit("count", {})
    with pytest.raises(UnknownJob) as problem:
        getattr(service, what)(name)
    assert problem.value.status == 404 and len(str(problem.value)) < 400 and "\n" not in str(problem.value)
    if name == "0001-cuont":
        assert "did you mean 0001-count" in str(problem.value)


def test_a_folder_of_a_lost_table_is_not_written_into(tmp_path):
    with open_service(tmp_path) as service:
        assert service.submit("count", {}).id == "0001-count"
    (tmp_path / "jobs.sqlite").unlink()
    with open_service(tmp_path) as service:
        assert service.submit("other", {}).id == "0002-other"


def test_a_table_of_another_format_or_none_is_refused(tmp_path):
    (tmp_path / "jobs.sqlite").write_bytes(b"no table at all, but long enough to look at" * 100)
    with pytest.raises(CheckpointError, match=r"jobs\.sqlite"):
        open_service(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="another folder"):
        open_service(tmp_path / "file")


ESCAPES = [
    "", ".", "..", "/etc/passwd", "../secret.txt", "a/../../secret.txt", "a/./b.txt", "a//b.txt", "a\\b.txt", "C:\\x",
    "C:x", "//host/share", "~/x", "a/b.txt\0", "\0", "link.txt", "loop", "out/secret.txt", "a", "b" * 300, "c/" * 600,
    "\ud800", "%2e%2e/secret.txt", "..%2fsecret.txt", "a/b.txt/", "run.json.tmp-12", "a/b.txt:stream",
]  # fmt: skip


@pytest.fixture
def folder_with_traps(service):
    job = service.submit("count", {})
    (service.folder / "secret.txt").write_text("secret")
    (job.folder / "a").mkdir()
    (job.folder / "a" / "b.txt").write_text("fine")
    (job.folder / "run.json.tmp-12").write_text("half")
    if sys.platform != "win32":
        (job.folder / "link.txt").symlink_to(service.folder / "secret.txt")
        (job.folder / "out").symlink_to(service.folder)
        (job.folder / "loop").symlink_to(job.folder / "loop")
        (job.folder / "inner.txt").symlink_to(job.folder / "a" / "b.txt")
    return job


def test_artefacts_are_listed_with_size_and_time_and_opened_by_name(service, folder_with_traps):
    artefacts = {artefact.path: artefact for artefact in service.artefacts(folder_with_traps.id)}
    inner = {"inner.txt"} if sys.platform != "win32" else set()
    assert set(artefacts) == {"a/b.txt", "job.json"} | inner
    assert artefacts["a/b.txt"].size == 4 and abs(artefacts["a/b.txt"].modified - time.time()) < 60
    for name in artefacts:
        assert service.artefact(folder_with_traps.id, name).is_file()
    assert service.artefact(folder_with_traps.id, "a/b.txt").read_text() == "fine"


@pytest.mark.parametrize("name", ESCAPES)
def test_no_name_leads_out_of_the_folder(service, folder_with_traps, name):
    with pytest.raises(ArtefactError) as problem:
        service.artefact(folder_with_traps.id, name)
    assert problem.value.status == 404 and len(str(problem.value)) < 300 and "\n" not in str(problem.value)


def test_a_process_is_known_by_more_than_its_number():
    mine = processes.birth(os.getpid())
    assert mine is not None and processes.alive(os.getpid(), mine)
    assert not processes.alive(os.getpid(), mine + "1") and not processes.alive(None, mine)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    wait_until(lambda: processes.birth(ended.pid) is None)  # a zombie is dead, though it was not waited for
    ended.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="ticks are Linux's")
def test_a_job_table_of_before_knows_its_processes(monkeypatch):
    """The boot and the tick as the kernel writes them, whatever has become of the clock since the boot."""
    stat = Path("/proc/self/stat").read_text()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    written = f"{boot}:{stat[stat.rfind(')') + 2 :].split()[19]}"
    assert processes.birth(os.getpid()) == written
    now = psutil.boot_time()
    for clock in ([now + 3600.0] * 3, [now, now + 1.0, now + 1.0, *[now + 1.0] * 3]):  # set before, set in between
        answers = iter(clock)

        def boot_time(answers=answers) -> float:
            answer = next(answers)
            monkeypatch.setattr(psutil._psplatform, "BOOT_TIME", answer, raising=False)  # where psutil 5 keeps it
            return answer

        monkeypatch.setattr(psutil, "boot_time", boot_time)
        monkeypatch.setattr(psutil._psplatform, "boot_time", boot_time)
        assert processes._tick(os.getpid()) == int(written.partition(":")[2])


@posix
@pytest.mark.parametrize("born", ["Sat Nov 28 10:00:00 2026", "30983412:1234", "", "1764324000.5", "no-boot:7", None])
def test_a_birth_in_another_form_is_nobody_s_and_nothing_is_killed_for_it(born):
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        assert not processes.alive(stranger.pid, born)
        processes.end_group(stranger.pid, born, stranger.pid, born)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.parametrize("pid", [-1, 0, 2**22 + 1, 2**40])
def test_numbers_that_no_process_has_are_nobody_s(pid):
    assert processes.birth(pid) is None


def test_a_process_is_ended_with_all_that_descend_from_it():
    """As on Windows, where a group cannot be killed."""
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    sleeper = "import time; print(1, flush=True); time.sleep(60)"
    head = subprocess.Popen([sys.executable, "-c", code, sleeper], stdout=subprocess.PIPE)
    head.stdout.readline()
    (below,) = psutil.Process(head.pid).children()
    threading.Thread(target=head.wait, daemon=True).start()
    processes._end([head.pid, 2**22 + 1])
    assert processes.birth(head.pid) is None and processes.birth(below.pid) is None
    head.stdout.close()


def test_the_room_loads_no_torch():
    code = "import sys, hildanext.stages.submission, hildanext.jobs.service, hildanext.jobs.worker; "
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_errors_are_of_the_house():
    assert all(issubclass(kind, HildaError) for kind in (UnknownJob, JobConflict, JobsFull, ArtefactError))
