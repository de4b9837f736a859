"""Runs programs in the sandbox: one at a time, or many with a few workers."""

import functools
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from hildanext.core.errors import SandboxError
from hildanext.grading.sandbox import launcher as _launcher  # noqa: F401  (compiles it: the children write no bytecode)
from hildanext.grading.sandbox.checker import SECONDS_TO_START, SECONDS_TO_STOP, STARTED
from hildanext.grading.sandbox.levels import (
    CANARY,
    MECHANISMS,
    Isolation,
    applicable,
    forbidden,
    hidden_paths,
    readable_paths,
)
from hildanext.grading.sandbox.limits import Job, Limits, Verdict

logger = logging.getLogger(__name__)

FLAGS = ("-P", "-s", "-S", "-B")
"""Python's `-I` without its `-E`, which would ignore PYTHONHASHSEED too: sets would have another order each time, and
programs another verdict. The environment is ours, whole."""
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
ATTEMPTS = 3
"""A `sandbox_error` is tried again this often."""

DEEPEST_FOLDER = 100

_SOURCE = str(Path(__file__).parents[3])
_BOOT = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); name = sys.argv.pop(1); "
    "import importlib; module = importlib.import_module('hildanext.grading.sandbox.' + name); "
    "sys.path.pop(0); module.main()"
)


class Sandbox:
    """Where programs run. Finds out at once how well it can lock them up, and refuses to go without.

    `without` leaves mechanisms unused, for tests and comparisons. Raises `SandboxError` where there is no isolation
    (level 0), unless `allow_unsafe_execution` says that this is understood.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        allow_unsafe_execution: bool = False,
        without: Sequence[str] = (),
    ) -> None:
        self.limits = limits if limits is not None else Limits()
        self.isolation = probe(tuple(sorted(without)))
        if self.isolation.level == 0 and not allow_unsafe_execution:
            raise SandboxError(
                f"no isolation for running generated programs here ({self.isolation.why_not_higher()})",
                "run on Linux with user namespaces or seccomp, or allow unsafe execution: they then act as your user",
            )

    def run(self, job: Job) -> Verdict:
        """The verdict on one job. Never raises for what a program does; `sandbox_error` is tried again first."""
        for _ in range(ATTEMPTS):
            verdict = judge(job, self.limits, self.isolation.mechanisms)
            if verdict.kind != "sandbox_error":
                return verdict
        logger.warning("sandbox_error in %d attempts: %s", ATTEMPTS, verdict.detail)
        return verdict

    def run_many(
        self, jobs: Sequence[Job], workers: int | None = None, done: Callable[[Verdict], None] | None = None
    ) -> list[Verdict]:
        """Verdicts in the order of the jobs, `workers` at a time (default: the usable cores); `done` hears of each."""
        workers = workers if workers is not None else usable_cores()
        verdicts = []
        with ThreadPoolExecutor(workers, "sandbox") as pool:
            futures = [pool.submit(self.run, job) for job in jobs]
            try:
                for future in futures:
                    verdicts.append(future.result())
                    if done is not None:
                        done(verdicts[-1])
            finally:
                pool.shutdown(cancel_futures=True)
        return verdicts


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def probe(without: tuple[str, ...] = ()) -> Isolation:
    """What works on this machine, tried with real workers once per process."""
    reasons = {name: "left out on request" for name in without}
    working = []
    for name in MECHANISMS:
        if name in without:
            continue
        if sys.platform != "linux":
            reasons[name] = f"needs Linux, this is {sys.platform}"
            continue
        verdict = judge(Job("def f(): pass", "f", "def check(c): c()"), Limits(seconds=10), (name,))
        if verdict.passed:
            working.append(name)
        else:
            reasons[name] = verdict.detail or verdict.kind
    isolation = Isolation(applicable(working), reasons)
    if isolation.mechanisms and (problem := _canary(isolation.mechanisms)):
        broken = dict.fromkeys(isolation.mechanisms, f"it does not hold here ({problem})")
        isolation = Isolation((), {**reasons, **broken})
    log = logger.warning if isolation.level < 2 else logger.info
    log("sandbox %s", isolation.describe())
    return isolation


def _canary(mechanisms: Sequence[str]) -> str:
    """What a program managed that it must not, or why that is not known; empty where all is well."""
    with tempfile.NamedTemporaryFile() as secret:
        test = (
            "def check(candidate):\n"
            f"    escaped = set(candidate({secret.name!r}, {os.getpid()})) & set({sorted(forbidden(mechanisms))!r})\n"
            "    assert not escaped, ', '.join(sorted(escaped))\n"
        )
        verdict = judge(Job(CANARY, "escapes", test), Limits(seconds=10), mechanisms)
    return "" if verdict.passed else verdict.detail or verdict.kind


def judge(job: Job, limits: Limits, mechanisms: Sequence[str]) -> Verdict:
    """One checker and one worker for one job; everything they started and wrote is gone when this returns."""
    if len(job.program) > limits.message_bytes:
        return Verdict("failed", f"a program of {len(job.program)} characters")
    with _work_folder(private="namespaces" in mechanisms) as folder:
        text = json.dumps(_order(job, limits, mechanisms, folder)).encode("ascii") + b"\n"
        pipe, patience = subprocess.PIPE, limits.seconds + SECONDS_TO_START + 2 * SECONDS_TO_STOP
        with subprocess.Popen(
            _command("checker"),
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env=_environment(),
            cwd=folder,
            start_new_session=True,
        ) as process:
            try:
                output, errors = process.communicate(text, patience)
            except subprocess.TimeoutExpired:
                _end(process)
                output, errors = _last_words(process)
            finally:
                _end(process)
    return _read(output, errors, process.returncode, limits.seconds)


def _order(job: Job, limits: Limits, mechanisms: Sequence[str], folder: str) -> dict[str, object]:
    nonce, bounds, readable = secrets.token_hex(16), limits.settings(), readable_paths()
    worker = {
        "nonce": nonce,
        "limits": bounds,
        "mechanisms": list(mechanisms),
        "folder": folder,
        "readable": readable,
        "hidden": hidden_paths(readable),
    }
    return {
        "launcher": [*_command("launcher"), json.dumps(worker)],
        "nonce": nonce,
        "limits": bounds,
        "mechanisms": list(mechanisms),
        "program": job.program,
        "entry_point": job.entry_point,
        "setup": job.setup,
        "test": job.test,
    }


def _command(module: str) -> list[str]:
    return [sys.executable, *FLAGS, "-c", _BOOT, _SOURCE, module]


def _environment() -> dict[str, str]:
    if os.name == "nt":
        return {**ENVIRONMENT, "SYSTEMROOT": os.environ.get("SYSTEMROOT", "")}  # Python does not start without it there
    return ENVIRONMENT


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the checker's group; its launcher sees that and kills the worker."""
    if process.poll() is None:
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()


def _last_words(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    """What a killed checker had said, once its launcher is gone too."""
    try:
        return process.communicate(timeout=SECONDS_TO_STOP)
    except subprocess.TimeoutExpired as late:
        return late.stdout or b"", b"its launcher did not end"


def _read(output: bytes, errors: bytes, code: int, seconds: float) -> Verdict:
    _, started, last = output.rpartition(STARTED)
    try:
        verdict = json.loads(last)
        return Verdict(**{**verdict, "detail": _printable(verdict["detail"])})
    except (ValueError, TypeError, KeyError):
        if started:
            return Verdict("timeout", "the test itself did not come to an end", seconds)
        last_line = errors.decode(errors="replace").strip().rpartition("\n")[2]
        return Verdict("sandbox_error", _printable(f"the checker ended with {code}: {last_line[:300]}"))


def _printable(text: str) -> str:
    """Programs choose what their exceptions say: no escape sequences reach a terminal or a log."""
    return "".join(c if c.isprintable() else "?" for c in text)


@contextmanager
def _work_folder(private: bool) -> Iterator[str]:
    """Where the worker stands; a folder of its own unless its namespaces hold one. Removed whatever is in it."""
    if private:
        yield tempfile.gettempdir()
        return
    folder = tempfile.mkdtemp(prefix="hilda-sandbox-")
    try:
        yield folder
    finally:
        remove_tree(folder)


def remove_tree(folder: str) -> None:
    """Delete a folder of any depth, also where permissions were taken away; links are removed and never followed."""
    os.chmod(folder, 0o700)
    while names := os.listdir(folder):
        for name in names:
            _remove(os.path.join(folder, name), folder, 0)
    os.rmdir(folder)


def _remove(path: str, top: str, depth: int) -> None:
    if os.path.islink(path) or not os.path.isdir(path):
        os.unlink(path)
        return
    os.chmod(path, 0o700)
    if depth == DEEPEST_FOLDER:  # brought up, and found there by the next round: no path and no recursion grows long
        os.rename(path, os.path.join(top, secrets.token_hex(16)))
        return
    for name in os.listdir(path):
        _remove(os.path.join(path, name), top, depth + 1)
    os.rmdir(path)
