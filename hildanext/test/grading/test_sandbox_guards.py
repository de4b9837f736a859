"""Each guard of the sandbox with the others left out, so that none of them hides that another is gone."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable

import pytest

from hildanext.grading.sandbox import checker, launcher, levels
from hildanext.grading.sandbox.limits import Job, Limits, Verdict
from hildanext.grading.sandbox.run import Sandbox, judge, probe
from hostile import body

ADD = "def check(candidate):\n    assert candidate(1, 2) == 3\n"
LIMITS = Limits(seconds=20)

EVERYTHING = {
    "read a private file",
    "write a private file",
    "make a socket",
    "signal another process",
    "make a process",
}

STOPPED_BY = {
    "namespaces": {"read a private file", "write a private file", "signal another process"},
    "seccomp": {"write a private file", "signal another process", "make a socket", "make a process"},
    "landlock": {"read a private file", "write a private file"},
}
"""What each mechanism must stop by itself, and nothing else stops when it is alone."""


def ours(text: str) -> Verdict:
    """A job whose test looks at the checker's own process; nothing is locked down."""
    return judge(Job(body("return a + b"), "add", text), LIMITS, ())


def escapes(mechanisms: tuple[str, ...]) -> set[str]:
    """What the canary manages."""
    with tempfile.NamedTemporaryFile() as secret:
        os.chmod(secret.name, 0o666)  # what is not stopped is then open to any user that the worker may have become
        test = f"def check(c):\n    assert 0, '|' + '|'.join(c({secret.name!r}, {os.getpid()}))\n"
        verdict = judge(Job(levels.CANARY, "escapes", test), LIMITS, mechanisms)
    assert verdict.kind == "failed" and "AssertionError" in verdict.detail, verdict
    return set(verdict.detail.split("|")[1:])


def works_alone(name: str) -> bool:
    isolation = probe(tuple(sorted(set(levels.MECHANISMS) - {name})))
    assert "does not hold" not in isolation.reasons.get(name, ""), "a broken guard is no reason to skip"
    return name in isolation.mechanisms


@pytest.mark.parametrize("name", levels.MECHANISMS)
def test_a_mechanism_alone_stops_what_it_is_there_for(name: str):
    if not works_alone(name):
        pytest.skip(f"no {name} here")
    managed = escapes((name,))
    assert not managed & STOPPED_BY[name] and not managed & levels.forbidden([name])


def test_without_any_mechanism_the_canary_manages_everything_that_a_user_may():
    """Else the tests above would say nothing."""
    assert escapes(()) >= EVERYTHING


@pytest.mark.parametrize("name", levels.MECHANISMS)
def test_each_is_left_out_on_request(name: str):
    left = probe((name,))
    assert name not in left.mechanisms and left.reasons[name] == "left out on request"


class TestLimitsAlone:
    """No mechanism: what resource limits and the launcher's own care must do."""

    def outcome(self, text: str, test: str = ADD, limits: Limits = LIMITS) -> Verdict:
        return judge(Job(body(text), "add", test), limits, ())

    def test_no_descriptor_but_the_channel_is_open(self):
        text = (
            "import os\nkept = []\nfor number in range(256):\n    try:\n        os.fstat(number)\n"
            "    except OSError:\n        continue\n    kept.append(number)\nreturn kept"
        )
        verdict = self.outcome(text, "def check(c): assert c(1, 2) == [0, 1, 2, 3, 4], c(1, 2)")
        assert verdict.passed, verdict

    def test_the_environment_is_the_sandbox_s_own(self, monkeypatch):
        monkeypatch.setenv("HILDA_SECRET_OF_A_TEST", "x")
        test = "def check(c): assert 'HILDA_SECRET_OF_A_TEST' not in c(1, 2), c(1, 2)"
        verdict = self.outcome("import os\nreturn sorted(os.environ)", test)
        assert verdict.passed, verdict

    def test_the_worker_does_not_dump_its_memory(self):
        dumpable = "import ctypes\nreturn ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)"
        if sys.platform == "linux":
            assert self.outcome(dumpable, "def check(c): assert c(1, 2) == 0").passed

    @pytest.mark.parametrize(
        ("name", "wanted"), [("AS", LIMITS.memory_bytes), ("FSIZE", LIMITS.file_bytes), ("NOFILE", LIMITS.open_files)]
    )
    def test_limits_are_set(self, name: str, wanted: int):
        read = f"import resource\nreturn resource.getrlimit(resource.RLIMIT_{name})[1]"
        verdict = self.outcome(read, f"def check(c): assert 0 < c(1, 2) <= {wanted}, c(1, 2)")
        assert verdict.passed, verdict

    def test_memory_ends(self):
        limits = Limits(seconds=20, memory_bytes=256 << 20)
        assert self.outcome("x = bytearray(400 << 20)\nreturn 3", limits=limits).kind == "memory"

    def test_processor_time_ends_what_the_clock_does_not(self):
        """Time that a child's threads burn side by side is the process's own."""
        read = "import resource\nreturn resource.getrlimit(resource.RLIMIT_CPU)[0]"
        verdict = self.outcome(read, f"def check(c): assert c(1, 2) == {LIMITS.settings()['cpu_seconds']}, c(1, 2)")
        assert verdict.passed, verdict


class TestChecker:
    def test_it_loads_the_standard_library_alone(self):
        text = (
            "import sys\ndef check(c):\n    loaded = {m.partition('.')[0] for m in sys.modules}\n"
            "    assert 'hildanext' in loaded\n"
            "    foreign = sorted(loaded - set(sys.stdlib_module_names) - {'hildanext', '__main__', '__mp_main__'})\n"
            "    assert not [m for m in foreign if not m.startswith('_')], foreign\n"
        )
        verdict = ours(text)
        assert verdict.passed, verdict

    def test_so_does_the_worker(self):
        program = body("import sys\nreturn sorted({m.partition('.')[0] for m in sys.modules})")
        test = (
            "import sys\ndef check(c):\n    loaded = set(c(1, 2))\n    assert 'hildanext' in loaded\n"
            "    foreign = sorted(loaded - set(sys.stdlib_module_names) - {'hildanext', '__main__', 'program'})\n"
            "    assert not [m for m in foreign if not m.startswith('_')], foreign\n"
        )
        verdict = judge(Job(program, "add", test), LIMITS, ())
        assert verdict.passed, verdict

    @pytest.mark.skipif(sys.platform != "linux", reason="prctl")
    def test_its_memory_is_closed_to_others_of_the_same_user(self):
        text = "import ctypes\ndef check(c):\n    assert ctypes.CDLL(None).prctl(3, 0, 0, 0, 0) == 0\n"
        assert ours(text).passed

    def test_what_a_test_prints_at_once_does_not_spoil_the_verdict(self):
        text = (
            "import os\ndef check(c):\n    print('hello', flush=True)\n    os.write(1, b'{')\n    assert c(1, 2) == 3\n"
        )
        assert ours(text).passed

    @pytest.mark.parametrize("kind", ["SystemExit", "KeyboardInterrupt", "GeneratorExit", "BaseExceptionGroup"])
    def test_no_exception_of_the_program_ends_the_test_past_its_handlers(self, kind: str):
        """A test that catches `Exception` meets whatever the candidate raises there."""
        caught = "    except Exception as e:\n        assert 'Candidate' in type(e).__name__\n"
        test = f"def check(c):\n    try:\n        c(1, 2)\n{caught}"
        raised = f"raise {kind}('x', [ValueError()])" if "Group" in kind else f"raise {kind}"
        assert judge(Job(body(raised), "add", test), LIMITS, ()).passed

    @pytest.mark.parametrize("kind", ["ValueError", "ZeroDivisionError", "KeyError"])
    def test_builtin_exceptions_arrive_as_they_were(self, kind: str):
        test = f"def check(c):\n    try:\n        c(1, 2)\n    except {kind}:\n        pass\n"
        assert judge(Job(body(f"raise {kind}"), "add", test), LIMITS, ()).passed


class Ended(BaseException):
    """In the place of the end of a process."""


@pytest.fixture
def verdict_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Verdict]:
    """What a judge says whose worker ended in a given way."""

    def end(_: int) -> None:
        raise Ended

    def say(ended: dict, act: Callable[[checker.Judge], None], started: bool = True) -> Verdict:
        read_from, write_to = os.pipe()
        judge = checker.Judge.__new__(checker.Judge)
        judge.verdict_to, judge.first, judge.calls = write_to, threading.Lock(), 0
        judge.started = 0.0 if started else None
        judge.job = {"limits": {"cpu_seconds": 4}, "mechanisms": ["seccomp"]}
        judge.stop = lambda patience=0.0: ended
        with monkeypatch.context() as patch, contextlib.suppress(Ended):
            patch.setattr(checker.os, "_exit", end)
            act(judge)
        os.close(write_to)
        with os.fdopen(read_from, "rb") as file:
            record = json.loads(file.read())
        return Verdict(record["kind"], record["detail"])

    return say


class TestWhatIsLeftOver:
    def test_processes_that_could_not_be_stopped_are_no_verdict(self, verdict_of):
        verdict = verdict_of({"exit": 0, "left": 3}, lambda judge: judge.finish("passed"))
        assert verdict == Verdict("sandbox_error", "3 processes could not be stopped")
        assert verdict_of({"exit": 0, "left": 0}, lambda judge: judge.finish("passed")).passed

    def test_nor_is_a_worker_that_could_not_be_stopped(self, verdict_of):
        verdict = verdict_of({}, lambda judge: judge.finish("passed"))
        assert verdict == Verdict("sandbox_error", "the worker could not be stopped")

    @pytest.mark.parametrize(
        ("end", "kind"),
        [
            ({"exit": 0, "left": 1, "cpu": 0.1}, "sandbox_error"),
            ({"exit": 77, "left": 0, "cpu": 0.1}, "memory"),
            ({"exit": 0, "left": 0, "cpu": 4.0}, "timeout"),
            ({"exit": -9, "left": 0, "cpu": 3.9}, "crashed"),
        ],
    )
    def test_how_a_worker_ended_by_itself(self, verdict_of, end: dict, kind: str):
        assert verdict_of(end, lambda judge: judge.bury()).kind == kind

    def test_a_worker_that_is_not_locked_down_as_asked_gets_no_program(self, verdict_of):
        def act(judge: checker.Judge) -> None:
            judge.receive = lambda: {"ready": []}
            judge.expect_ready()

        verdict = verdict_of({"exit": 0}, act, started=False)
        assert verdict == Verdict("sandbox_error", "the worker is not locked down as it should be")

    @pytest.mark.skipif(sys.platform != "linux", reason="/proc")
    def test_a_session_s_and_an_adopted_process_are_found(self):
        """The launcher's own children, and theirs, are what a worker left behind."""
        child = subprocess.Popen(["sleep", "30"], start_new_session=True)
        try:
            assert child.pid in launcher._descendants(2**22)
        finally:
            launcher.kill_if_there(child.pid)
            child.wait()
        assert child.pid not in launcher._descendants(2**22)
        launcher.kill_if_there(child.pid)  # gone already, which is no error


def test_a_sandbox_error_s_end_is_what_the_last_attempt_said(monkeypatch, caplog):
    answers = iter([Verdict("sandbox_error", str(number)) for number in range(3)])
    monkeypatch.setattr("hildanext.grading.sandbox.run.judge", lambda *_: next(answers))
    sandbox = Sandbox(without=levels.MECHANISMS, allow_unsafe_execution=True)
    assert sandbox.run(Job("", "f", "")) == Verdict("sandbox_error", "2")
    said = [record.getMessage() for record in caplog.records if "sandbox_error" in record.getMessage()]
    assert said == ["sandbox_error in 3 attempts: 2"], "one line"
