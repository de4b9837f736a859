"""The sandbox's parts: values as text, the filter on system calls, levels, refusals, and what it does by itself."""

import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hildanext.commands import doctor
from hildanext.core.config import validate
from hildanext.core.errors import ConfigError, SandboxError
from hildanext.grading.sandbox import levels, run, seccomp
from hildanext.grading.sandbox.channel import HEADER, BadFrame, Channel, Closed
from hildanext.grading.sandbox.codec import BadMessage, Unsendable, decode, encode, pack, unpack
from hildanext.grading.sandbox.levels import Isolation, applicable, forbidden
from hildanext.grading.sandbox.limits import Job, Limits, Verdict
from hildanext.grading.sandbox.run import Sandbox, judge, probe, remove_tree
from hildanext.grading.sandbox.syscalls import ALLOWED, AUDIT_ARCH, NUMBERS, WRITING
from hostile import body

ADD = "def check(candidate):\n    assert candidate(1, 2) == 3\n"

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**80), 2**80),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=())),
    st.binary(),
)
keys = st.one_of(scalars, st.tuples(scalars, scalars), st.frozensets(st.integers()))
values = st.recursive(
    st.one_of(keys, st.sets(st.integers())),
    lambda inner: st.one_of(st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(keys, inner)),
    max_leaves=12,
)


def same(one: object, other: object) -> bool:
    """Equal, of the same types all the way down, NaN and the sign of zero included."""
    return (
        repr(one) == repr(other) if not isinstance(one, set | frozenset) else one == other and type(one) is type(other)
    )


class TestCodec:
    @settings(max_examples=40)
    @given(values)
    def test_values_come_back_as_they_were(self, value):
        decoded = decode(unpack(pack({"value": encode(value, 1 << 20)}))["value"])
        assert type(decoded) is type(value) and (decoded == value or same(decoded, value))

    @settings(max_examples=40)
    @given(
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), st.text()),
            lambda x: st.one_of(st.lists(x), st.dictionaries(st.sampled_from("tdszbif"), x, max_size=2)),
            max_leaves=10,
        )
    )
    def test_whatever_is_sent_is_decoded_or_refused(self, sent):
        try:
            value = decode(sent)
        except BadMessage:
            return
        assert type(value) in (type(None), bool, int, float, str, list, tuple, dict, set, frozenset, bytes)

    @settings(max_examples=40)
    @given(st.binary())
    def test_bytes_that_are_no_message_are_refused(self, data):
        try:
            assert type(unpack(data)) is dict
        except BadMessage:
            pass

    @pytest.mark.parametrize("value", [object(), (x for x in ()), 3j, range(3), print, type])
    def test_other_types_are_not_sent(self, value):
        with pytest.raises(Unsendable) as caught:
            encode([value], 1 << 20)
        assert not caught.value.own

    def test_an_object_of_the_program_s_own_class_is_told_apart(self):
        own = type("Own", (), {"__module__": "program"})()
        with pytest.raises(Unsendable) as caught:
            encode(own, 1 << 20, "program")
        assert caught.value.own

    def test_the_budget_counts_what_is_written_not_what_is_held(self):
        shared = ["x" * 1000] * 10
        assert encode(shared, 20_000) == shared
        with pytest.raises(Unsendable, match="too large"):
            encode([shared] * 10, 20_000)

    def test_float_and_int_and_bool_stay_what_they_are(self):
        decoded = decode(unpack(pack({"value": encode([1, 1.0, True, -0.0, math.nan], 99)}))["value"])
        assert [type(x) for x in decoded] == [int, float, bool, float, float] and math.copysign(1, decoded[3]) == -1


class TestChannel:
    def pair(self, nonce: bytes = b"n" * 16, most: int = 100) -> tuple[int, Channel]:
        read_end, write_end = os.pipe()
        return write_end, Channel(read_end, -1, nonce, most)

    @pytest.mark.parametrize(
        ("data", "error"),
        [
            (HEADER.pack(3, b"m" * 16) + b"abc", BadFrame),
            (HEADER.pack(101, b"n" * 16) + b"a" * 101, BadFrame),
            (HEADER.pack(3, b"n" * 16) + b"ab", Closed),
            (b"", Closed),
        ],
    )
    def test_frames_that_are_none(self, data, error):
        write_end, channel = self.pair()
        os.write(write_end, data)
        os.close(write_end)
        with pytest.raises(error):
            channel.receive()
        os.close(channel.read_from)

    def test_frames_one_after_another(self):
        write_end, channel = self.pair()
        Channel(-1, write_end, b"n" * 16, 0).send(b"one")
        Channel(-1, write_end, b"n" * 16, 0).send(b"")
        assert (channel.receive(), channel.receive()) == (b"one", b"")
        os.close(write_end)
        os.close(channel.read_from)


def evaluate(program: list, machine: str, number: int, arguments: tuple[int, ...] = ()) -> int:
    """What the filter answers to a call: the kernel's own interpreter, in ten lines."""
    words = {0: number, 4: AUDIT_ARCH[machine]}
    for index in range(6):
        value = arguments[index] if index < len(arguments) else 0
        words[16 + 8 * index], words[20 + 8 * index] = value & 0xFFFFFFFF, value >> 32 & 0xFFFFFFFF
    place, accumulator = 0, 0
    while True:
        code, yes, no, value = program[place]
        place += 1
        if code == seccomp.RETURN:
            return value
        if code == seccomp.LOAD:
            accumulator = words[value]
        elif code == seccomp.AND:
            accumulator &= value
        else:
            place += yes if (accumulator == value if code == seccomp.EQUAL else accumulator >= value) else no


@pytest.mark.parametrize("machine", NUMBERS)
class TestFilter:
    def allows(self, machine, name, *arguments, may_write=True):
        program = seccomp.compile_filter(machine, 77, may_write)
        return evaluate(program, machine, NUMBERS[machine][name], arguments) == seccomp.ALLOW

    def test_allows_what_is_listed_and_nothing_else(self, machine):
        numbers = NUMBERS[machine]
        program = seccomp.compile_filter(machine, 77, True)
        listed = {numbers[name] for name in (*ALLOWED, *WRITING, "open", "openat") if name in numbers}
        checked = {numbers[name] for name in seccomp.checks(77, True) if name in numbers}
        for number in range(600):
            answer = evaluate(program, machine, number)
            if number not in checked:
                refusal = seccomp.NO_SUCH_CALL if number >= 424 else seccomp.NOT_PERMITTED
                assert answer == (seccomp.ALLOW if number in listed else refusal), number

    def test_every_other_machine_s_calls_are_deadly(self, machine):
        program = seccomp.compile_filter(machine, 77, True)
        other = next(name for name in AUDIT_ARCH if name != machine)
        assert evaluate(program, other, NUMBERS[machine]["read"]) == seccomp.KILL
        assert evaluate(program, machine, 0x40000000 | NUMBERS[machine]["read"]) == seccomp.KILL

    def test_threads_but_no_processes(self, machine):
        thread = 0x3D0F00
        assert self.allows(machine, "clone", thread)
        for flags in (0, 17, 0x4100, thread | 0x10000000, thread | 0x00020000, thread & ~0x10000):
            assert not self.allows(machine, "clone", flags)
        assert not self.allows(machine, "clone3", 1)

    def test_signals_to_itself_only(self, machine):
        for name in ("kill", "tgkill"):
            assert self.allows(machine, name, 77, 6)
            for process in (0, 1, 76, 0xFFFFFFFF, -1 & 0xFFFFFFFFFFFFFFFF):
                assert not self.allows(machine, name, process, 6)

    def test_limits_are_read_and_never_set(self, machine):
        assert self.allows(machine, "prlimit64", 0, 7, 0, 0x7FFF00000000)
        assert not self.allows(machine, "prlimit64", 5, 7, 0, 0x7FFF00000000)
        assert not self.allows(machine, "prlimit64", 0, 7, 0x7FFF, 0)
        assert not self.allows(machine, "prlimit64", 0, 7, 0x7FFF00000000, 0)

    def test_descriptors_do_not_aim_signals_at_others(self, machine):
        for command in (8, 10, 15, 1031):  # set owner, set signal, set owner by structure, size of a pipe
            assert not self.allows(machine, "fcntl", 3, command)
        assert self.allows(machine, "fcntl", 3, 3) and not self.allows(machine, "ioctl", 0, 0x5412)

    def test_without_a_root_of_its_own_nothing_is_opened_for_writing(self, machine):
        for flags in (1, 2, 0o100, 0o1000, 0o20200001):
            assert self.allows(machine, "openat", 0, 0, flags)
            assert not self.allows(machine, "openat", 0, 0, flags, may_write=False)
        assert self.allows(machine, "openat", 0, 0, 0o2000000, may_write=False)
        assert not self.allows(machine, "unlinkat", 0, 0, 0, may_write=False)


def test_no_table_is_a_reason_not_a_guess():
    with pytest.raises(OSError, match="riscv64"):
        seccomp.compile_filter("riscv64", 1, True)


class TestLevels:
    @pytest.mark.parametrize(
        ("working", "used", "level"),
        [
            (("namespaces", "seccomp", "landlock"), ("namespaces", "seccomp"), 3),
            (("namespaces", "landlock"), ("namespaces",), 2),
            (("landlock", "seccomp"), ("seccomp", "landlock"), 1),
            (("landlock",), ("landlock",), 0),
            ((), (), 0),
        ],
    )
    def test_what_is_used_of_what_works(self, working, used, level):
        assert applicable(working) == used and Isolation(used).level == level
        assert f"level {level}" in Isolation(used).describe()

    def test_reasons_are_told_where_the_level_is_not_the_highest(self):
        assert Isolation(("namespaces", "seccomp"), {"landlock": "old"}).why_not_higher() == ""
        assert "no seccomp: why" in Isolation(("namespaces",), {"seccomp": "why"}).why_not_higher()

    def test_the_canary_covers_what_each_mechanism_promises(self):
        assert forbidden(["seccomp", "landlock"]) >= {"read a private file", "make a socket", "make a process"}
        assert "make a socket" not in forbidden(["namespaces"]) and "read a private file" not in forbidden(["seccomp"])

    def test_readable_paths_are_python_s_and_the_system_s_libraries(self):
        paths = levels.readable_paths()
        assert any(os.__file__.startswith(path + os.sep) for path in paths)
        assert not any(str(Path.home()) == path or __file__.startswith(path + os.sep) for path in paths)

    def test_the_canary_finds_an_open_door(self):
        """With nothing locked it manages everything but what only another's would be."""
        escaped = (
            "def check(c):\n    assert 'read a private file' in c(__import__('sys').argv[0] or '/etc/hostname', 1)"
        )
        test = escaped.replace("__import__('sys').argv[0] or '/etc/hostname'", repr(__file__))
        assert judge(Job(levels.CANARY, "escapes", test), Limits(seconds=10), ()).passed

    def test_what_this_machine_can_do_is_used_and_holds(self):
        """So that a broken sandbox fails here, and does not only skip the tests that need it."""
        reasons = probe().reasons
        assert not [reason for reason in reasons.values() if "does not hold" in reason]
        if sys.platform != "linux":
            return
        tried = shutil.which("unshare") and subprocess.run(["unshare", "-Urpnim", "true"], capture_output=True)
        if tried and tried.returncode == 0 and os.uname().machine in NUMBERS:
            assert probe().level == 3, reasons

    @pytest.mark.skipif(probe().level < 1, reason="no mechanism works here")
    def test_a_mechanism_that_does_not_hold_is_not_used(self, monkeypatch):
        monkeypatch.setattr(run, "_canary", lambda mechanisms: "make a socket")
        probe.cache_clear()
        try:
            isolation = probe()
        finally:
            probe.cache_clear()
        assert isolation.level == 0 and "does not hold" in isolation.why_not_higher()


class TestRefusal:
    def test_without_isolation_it_refuses(self):
        with pytest.raises(SandboxError, match="left out on request") as caught:
            Sandbox(without=levels.MECHANISMS)
        assert "allow unsafe execution" in caught.value.hint

    def test_unless_that_is_allowed(self, caplog):
        probe.cache_clear()
        with caplog.at_level(logging.WARNING):
            sandbox = Sandbox(Limits(seconds=10), allow_unsafe_execution=True, without=levels.MECHANISMS)
        assert "level 0" in caplog.text
        assert sandbox.run(Job(body("return a + b"), "add", ADD)).passed
        assert sandbox.run(Job(body("import os; os._exit(0)"), "add", ADD)).kind == "crashed"

    @pytest.mark.parametrize("platform", ["darwin", "win32"])
    def test_other_systems_are_named(self, monkeypatch, platform):
        monkeypatch.setattr(sys, "platform", platform)
        probe.cache_clear()
        try:
            with pytest.raises(SandboxError, match=f"needs Linux, this is {platform}"):
                Sandbox()
        finally:
            monkeypatch.undo()
            probe.cache_clear()

    def test_limits_are_strict(self):
        with pytest.raises(ConfigError, match="did you mean 'seconds'"):
            validate(Limits, {"second": 3}, where="limits")
        with pytest.raises(ConfigError, match="seconds"):
            validate(Limits, {"seconds": 0}, where="limits")


class TestDoctor:
    def test_tells_the_level(self):
        (finding,) = doctor.examine_sandbox()
        assert finding.what == "sandbox" and f"level {probe().level}" in finding.value
        assert (finding.state == "ok") == (probe().level == 3)

    def test_tells_why_it_is_not_higher(self, monkeypatch):
        monkeypatch.setattr(run, "probe", lambda: Isolation((), {"namespaces": "not permitted"}))
        (finding,) = doctor.examine_sandbox()
        assert finding.state == "note" and "no namespaces: not permitted" in finding.advice
        assert "refused" in finding.advice


class TestItself:
    def test_a_test_that_does_not_run_is_nobody_s_fault(self):
        for test, reason in (("def chek(c): pass", "defines no check"), ("def check(c:", "SyntaxError")):
            verdict = judge(Job(body("return a + b"), "add", test), Limits(), probe().mechanisms)
            assert verdict.kind == "sandbox_error" and reason in verdict.detail

    def test_an_argument_that_cannot_be_sent_is_nobody_s_fault(self):
        verdict = judge(Job(body("return a + b"), "add", "def check(c): c(print, 1)"), Limits(), probe().mechanisms)
        assert verdict.kind == "sandbox_error" and "passes" in verdict.detail

    def test_a_mechanism_that_cannot_be_had_is_nobody_s_fault(self):
        verdict = judge(Job(body("return a + b"), "add", ADD), Limits(), ("unheard of",))
        assert verdict.kind == "sandbox_error" and "no such mechanism: unheard of" in verdict.detail

    def test_a_sandbox_error_is_tried_again(self, monkeypatch):
        answers = iter([Verdict("sandbox_error"), Verdict("sandbox_error"), Verdict("passed")])
        monkeypatch.setattr(run, "judge", lambda *_: next(answers))
        assert Sandbox(without=levels.MECHANISMS, allow_unsafe_execution=True).run(Job("", "f", "")).passed

    def test_the_test_s_output_and_exit_do_not_make_a_verdict(self):
        test = 'def check(c):\n    print(\'{"kind": "passed"}\')\n    raise SystemExit(0)\n'
        assert judge(Job(body("return 0"), "add", test), Limits(), probe().mechanisms).kind == "failed"

    def test_helpers_of_the_task_run_with_the_test_and_the_program_cannot_replace_them(self):
        setup = "def same(x, y):\n    return x == y\n"
        program = body("return 0") + "def same(x, y): return True\n"
        job = Job(program, "add", "def check(c):\n    assert same(c(1, 2), 3)\n", setup)
        assert judge(job, Limits(), probe().mechanisms).kind == "failed"

    def test_the_test_may_call_the_function_by_its_name(self):
        job = Job(body("return a + b"), "add", "def check(c):\n    assert add(1, 2) == c(2, 1) == 3\n")
        assert judge(job, Limits(), probe().mechanisms).passed

    def test_many_come_back_in_order_and_each_is_told_of(self):
        heard = []
        jobs = [Job(body(f"return {number}"), "add", ADD) for number in range(6)]
        verdicts = Sandbox(allow_unsafe_execution=True).run_many(jobs, workers=3, done=heard.append)
        assert [v.kind for v in verdicts] == ["failed"] * 3 + ["passed"] + ["failed"] * 2 and heard == verdicts

    def test_sets_have_one_order(self):
        test = "def check(c): assert 0, c(1, 2)"
        job = Job(body("return ' '.join({'a', 'b', 'c', 'd', 'e', 'f', 'g'})"), "add", test)
        assert len({judge(job, Limits(), probe().mechanisms).detail for _ in range(3)}) == 1

    def test_when_the_checker_is_killed_the_worker_goes_too(self):
        mark = f"hilda-orphan-{os.getpid()}-{time.monotonic_ns()}"
        job = Job(body(f"import time\ntime.sleep(60)  # {mark}"), "add", ADD)
        before = children()
        thread = threading.Thread(target=judge, args=(job, Limits(seconds=60), probe().mechanisms))
        thread.start()
        checker = wait_for(lambda: next(iter(children() - before), None))
        launcher = wait_for(lambda: next(iter(children(checker)), None))
        worker = wait_for(lambda: next(iter(children(launcher)), None))
        time.sleep(0.3)
        os.kill(checker, signal.SIGKILL)
        thread.join(10)
        assert not thread.is_alive()
        assert not any(alive(process) for process in (checker, launcher, worker))

    def test_a_checker_that_stands_still_is_ended_with_all_its_processes(self, monkeypatch):
        monkeypatch.setattr(run, "SECONDS_TO_START", 2.0)
        monkeypatch.setattr(run, "SECONDS_TO_STOP", 1.0)
        before = children()
        test = "import os\ndef check(c):\n    os.kill(os.getpid(), 19)\n"
        verdict = judge(Job(body("return a + b"), "add", test), Limits(seconds=1), probe().mechanisms)
        assert verdict == Verdict("timeout", "the test itself did not come to an end", 1.0)
        assert children() <= before


def children(parent: int | None = None) -> set[int]:
    parent = os.getpid() if parent is None else parent
    listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True).stdout
    return {
        int(line)
        for line in listing.split()
        if Path(f"/proc/{line}/cmdline").exists() and b"hildanext" in Path(f"/proc/{line}/cmdline").read_bytes()
    }


def alive(process: int) -> bool:
    """Running; one that has ended and waits for its parent has no command line any more."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes() != b""
    except OSError:
        return False


def wait_for(something, seconds: float = 15.0):
    deadline = time.monotonic() + seconds
    while not (value := something()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


class TestFolder:
    def test_a_deep_tree_without_permissions_is_removed(self, tmp_path, monkeypatch):
        monkeypatch.setattr(run, "DEEPEST_FOLDER", 10)
        root = tmp_path / "root"
        root.mkdir()
        place = os.open(root, os.O_RDONLY)
        for _ in range(60):
            os.mkdir("d", dir_fd=place)
            deeper = os.open("d", os.O_RDONLY, dir_fd=place)
            os.close(place)
            place = deeper
        os.close(place)
        (root / "d" / "file").write_text("x")
        (root / "locked").mkdir()
        (root / "locked" / "inside").write_text("x")
        (root / "locked").chmod(0)
        root.chmod(0)
        remove_tree(str(root))
        assert not root.exists()

    def test_links_are_removed_and_never_followed(self, tmp_path):
        kept = tmp_path / "kept"
        kept.mkdir()
        (kept / "file").write_text("x")
        kept.chmod(0o500)
        root = tmp_path / "root"
        root.mkdir()
        (root / "link").symlink_to(kept, target_is_directory=True)
        remove_tree(str(root))
        assert (kept / "file").read_text() == "x" and kept.stat().st_mode & 0o777 == 0o500


@pytest.mark.skipif("namespaces" not in probe().mechanisms, reason="no namespaces here")
class TestLowerLevels:
    def test_without_the_filter_processes_are_counted_and_die_with_the_worker(self):
        bomb = body(
            "import os, time\nfor made in range(200):\n    try:\n        if os.fork() == 0:\n"
            "            os.setsid()\n            time.sleep(60)\n            os._exit(0)\n"
            "    except OSError:\n        return made\nreturn 200"
        )
        test = "def check(c):\n    assert 0 < c(1, 2) < 64\n"
        assert judge(Job(bomb, "add", test), Limits(seconds=20), ("namespaces",)).passed

    def test_a_signal_to_the_group_does_not_reach_the_launcher(self):
        job = Job(body("import os, time\nos.kill(0, 9)\ntime.sleep(0.5)\nreturn a + b"), "add", ADD)
        assert judge(job, Limits(seconds=20), ("namespaces",)).passed

    def test_the_network_is_empty(self):
        program = body(
            "import socket\ns = socket.socket()\ns.settimeout(2)\ns.connect(('127.0.0.1', 22))\nreturn a + b"
        )
        verdict = judge(Job(program, "add", ADD), Limits(seconds=20), ("namespaces",))
        assert verdict.kind == "failed" and "unreachable" in verdict.detail


@pytest.mark.skipif("landlock" not in probe(("namespaces",)).mechanisms, reason="no seccomp or no Landlock here")
class TestLevelOne:
    mechanisms = ("seccomp", "landlock")

    @pytest.mark.parametrize(
        "act",
        [
            f"open({__file__!r}).read()",
            "open('/etc/passwd').read()",
            "open('/proc/self/environ').read()",
            "open('x', 'w')",
            "os.listdir('/')",
            "os.mkdir('x')",
            "os.chmod('.', 0)",
            "os.kill(os.getppid(), 0)",
            "os.fork()",
            "os.execv('/bin/true', ['true'])",
            "__import__('socket').socket()",
            f"os.truncate({__file__!r}, 0)",
            f"os.unlink({__file__!r})",
        ],
    )
    def test_it_cannot(self, act):
        program = f"import os\ndef add(a, b):\n    {act}\n    return a + b\n"
        verdict = judge(Job(program, "add", ADD), Limits(seconds=20), self.mechanisms)
        assert verdict.kind == "failed" and "PermissionError" in verdict.detail, verdict

    def test_installed_packages_are_closed(self):
        packages = levels.hidden_paths(levels.readable_paths())
        file = next((path for folder in packages for path in Path(folder).rglob("*.py")), None)
        if file is None:
            pytest.skip("no packages beside Python's own library")
        program = f"def add(a, b):\n    open({str(file)!r}).read()\n    return a + b\n"
        verdict = judge(Job(program, "add", ADD), Limits(seconds=20), self.mechanisms)
        assert verdict.kind == "failed" and "PermissionError" in verdict.detail

    def test_honest_programs_pass(self):
        program = "import math, decimal, itertools, re\n" + body("import heapq\nreturn a + b")
        assert judge(Job(program, "add", ADD), Limits(seconds=20), self.mechanisms).passed


class TestLevelZero:
    """Only what resource limits, the clock and the launcher can do."""

    def test_a_daemon_does_not_survive(self, tmp_path):
        mark = tmp_path / "alive"
        program = body(
            f"import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        while True:\n"
            f"            os.utime({str(mark)!r})\n            time.sleep(0.02)\n    os._exit(0)\n"
            f"while os.stat({str(mark)!r}).st_mtime == 0: time.sleep(0.02)\nreturn 0"
        )
        mark.touch()
        for folder in (tmp_path, *list(tmp_path.parents)[:2]):
            folder.chmod(0o777)
        mark.chmod(0o777)
        os.utime(mark, (0, 0))
        assert judge(Job(program, "add", ADD), Limits(seconds=20), ()).kind == "failed"
        before = mark.stat().st_mtime_ns
        time.sleep(0.3)
        assert mark.stat().st_mtime_ns == before

    def test_where_there_is_no_fork_the_launcher_is_the_worker(self, monkeypatch):
        """As on Windows, which has no other way; clock and verdicts are the same."""
        monkeypatch.setattr(run, "_BOOT", "import os; del os.fork; " + run._BOOT)
        ends = {"return a + b": "passed", "return 0": "failed", "import os; os._exit(0)": "crashed"}
        for text, kind in ends.items():
            assert judge(Job(body(text), "add", ADD), Limits(seconds=20), ()).kind == kind
        assert judge(Job(body("while True: pass"), "add", ADD), Limits(seconds=0.5), ()).kind == "timeout"

    def test_its_folder_is_gone(self):
        program = body("import os\nopen('x', 'w').write('x')\nos.makedirs('d/e')\nos.chmod('d', 0)\nreturn os.getcwd()")
        verdict = judge(Job(program, "add", "def check(c): assert 0, c(1, 2)"), Limits(seconds=20), ())
        folder = verdict.detail.removeprefix("AssertionError: ")
        assert "hilda-sandbox-" in folder and not Path(folder).exists()

    def test_a_file_may_not_grow_large(self):
        program = body("open('x', 'wb').write(b'x' * (2 << 20))\nreturn a + b")
        verdict = judge(Job(program, "add", ADD), Limits(seconds=20), ())
        assert verdict.kind == "failed" and "too large" in verdict.detail
