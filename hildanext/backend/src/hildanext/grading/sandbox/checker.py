"""The trusted side: runs a test against a stub that passes each call to a worker, and prints a verdict.

What comes back is a value in plain types, or the kind of exception that was raised; everything the test compares lies
in this process. So nothing a program does to its own interpreter, its exit status or its output can make it pass.

The job comes as one JSON object on standard input, the verdict leaves as the last line of standard output.
"""

import builtins
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from hildanext.grading.sandbox.channel import BadFrame, Channel, Closed
from hildanext.grading.sandbox.codec import BadMessage, Unsendable, decode, encode, pack, unpack
from hildanext.grading.sandbox.worker import OUT_OF_MEMORY, Caught

STARTED = b"started\n"
SECONDS_TO_START = 20.0
SECONDS_TO_STOP = 5.0


class CandidateError(Exception):
    """The candidate raised something that no builtin exception stands for."""


def main() -> None:
    """Judge the job on standard input. Ends the process; never returns."""
    job = json.loads(sys.stdin.buffer.readline())
    verdict_to = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)  # a test that prints must not print into the verdict
    Judge(job, verdict_to).run()


class Judge:
    """One program, one test, one verdict. `finish` is called once, by whoever gets there first."""

    def __init__(self, job: Mapping[str, Any], verdict_to: int) -> None:
        self.job = job
        self.verdict_to = verdict_to
        self.calls = 0
        self.started: float | None = None
        self.first = threading.Lock()
        self.alarm: threading.Timer | None = None
        self.most_bytes = job["limits"]["message_bytes"]
        pipe = subprocess.PIPE
        # The launcher holds the verdict's pipe too and never writes: who reads it to its end knows that all is over.
        held = (verdict_to,) if os.name == "posix" else ()
        self.worker = subprocess.Popen(
            job["launcher"], stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True, pass_fds=held
        )
        assert self.worker.stdin and self.worker.stdout and self.worker.stderr
        nonce = bytes.fromhex(job["nonce"])
        self.channel = Channel(self.worker.stdout.fileno(), self.worker.stdin.fileno(), nonce, self.most_bytes + 256)

    def run(self) -> NoReturn:
        self.watch(SECONDS_TO_START, "sandbox_error", "the worker did not start")
        protect(self.job["limits"])
        self.expect_ready()
        scope = self.prepare()
        os.write(self.verdict_to, STARTED)
        self.started = time.monotonic()
        seconds = self.job["limits"]["seconds"]
        self.watch(seconds, "timeout", f"longer than {seconds:g} s")
        reply = self.exchange({"load": self.job["program"], "entry_point": self.job["entry_point"]}, 0)
        if "raised" in reply:
            self.finish("failed", f"did not load: {described(reply)}")
        with Caught() as trouble:
            scope["check"](scope[self.job["entry_point"]])
        if trouble.kind is None:
            self.finish("passed")
        with Caught():  # describing it may fail as well
            self.finish("failed", f"{trouble.kind.__name__}: {str(trouble.problem)[:200]}".rstrip(": "))
        self.finish("failed")

    def watch(self, seconds: float, kind: str, detail: str) -> None:
        """From now on, `finish(kind)` after that long; replaces the watch before."""
        if self.alarm:
            self.alarm.cancel()
        self.alarm = threading.Timer(seconds, self.finish, (kind, detail))
        self.alarm.daemon = True
        self.alarm.start()

    def expect_ready(self) -> None:
        message = self.receive()
        if "refused" in message:
            self.finish("sandbox_error", str(message["refused"]))
        if message.get("ready") != self.job["mechanisms"]:
            self.finish("sandbox_error", "the worker is not locked down as it should be")

    def prepare(self) -> dict[str, Any]:
        """The test's names, with the stub in the candidate's place; a test that does not run is nobody's fault."""
        scope: dict[str, Any] = {"__name__": "checker"}
        name = self.job["entry_point"]
        with Caught() as trouble:
            exec(compile(self.job["setup"], "<setup>", "exec"), scope)
            scope[name] = self.stub(name)
            exec(compile(self.job["test"], "<test>", "exec"), scope)
            if not callable(scope.get("check")):
                raise NameError("the test defines no check(candidate)")
        if trouble.kind:
            self.finish("sandbox_error", f"the test itself does not run: {trouble.kind.__name__}: {trouble.problem}")
        return scope

    def stub(self, name: str) -> Callable[..., Any]:
        def candidate(*arguments: Any, **named: Any) -> Any:
            return self.call(arguments, named)

        candidate.__name__ = candidate.__qualname__ = name
        return candidate

    def call(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """What the candidate returns, or raises. Everything else ends the judgement, past any handler of the test."""
        self.calls += 1
        try:
            sent = {"args": encode(arguments, self.most_bytes), "kwargs": encode(named, self.most_bytes)}
        except Unsendable as problem:
            self.finish("sandbox_error", f"the test passes {problem.why}")
        reply = self.exchange({"id": self.calls, **sent}, self.calls)
        if "raised" in reply:
            raise exception_like(reply)
        try:
            return decode(reply["value"])
        except BadMessage as problem:
            self.finish("protocol_error", f"returned {problem}")

    def exchange(self, message: dict[str, Any], number: int) -> dict[str, Any]:
        try:
            self.channel.send(pack(message))
        except Closed:
            self.bury()
        reply = self.receive()
        if type(reply.get("id")) is not int or reply["id"] != number:
            self.finish("protocol_error", "an answer that nothing asked for")
        if reply.get("memory") is True:
            self.finish("memory", "MemoryError")
        if type(reply.get("unsendable")) is str:
            kind = "failed" if reply.get("own") is True else "protocol_error"
            self.finish(kind, f"returned {reply['unsendable'][:200]}")
        if "raised" not in reply and "value" not in reply:
            self.finish("protocol_error", "an answer without a value")
        return reply

    def receive(self) -> dict[str, Any]:
        try:
            return unpack(self.channel.receive())
        except (BadFrame, BadMessage) as problem:
            self.finish("protocol_error", str(problem))
        except Closed:
            self.bury()

    def bury(self) -> NoReturn:
        """The worker is gone, or has let go of the channel: say how it ended."""
        with self.first:
            try:
                self.print(*self.autopsy(self.stop(patience=0.5)))
            finally:
                os._exit(1)

    def autopsy(self, end: dict[str, Any]) -> tuple[str, str]:
        code, cpu = end.get("exit"), end.get("cpu", 0.0)
        if self.started is None or end.get("left"):
            return "sandbox_error", f"the worker ended: {end}"
        if code == OUT_OF_MEMORY:
            return "memory", "MemoryError"
        if cpu >= self.job["limits"]["cpu_seconds"]:
            return "timeout", f"{cpu:g} s of processor time"
        return "crashed", f"ended by signal {-code}" if type(code) is int and code < 0 else f"exit status {code}"

    def finish(self, kind: str, detail: str = "") -> NoReturn:
        """Stop the worker, print the verdict, end. Whoever comes second waits for the end."""
        with self.first:
            try:
                end = self.stop()
                if not end:
                    kind, detail = "sandbox_error", "the worker could not be stopped"
                elif end.get("left"):
                    kind, detail = "sandbox_error", f"{end['left']} processes could not be stopped"
                self.print(kind, detail)
            finally:
                os._exit(1)  # never back into the test, whatever went wrong

    def stop(self, patience: float = 0.0) -> dict[str, Any]:
        """End the worker, after `patience` seconds for doing so itself; how it ended, empty where that failed."""
        try:
            self.worker.wait(patience)
        except subprocess.TimeoutExpired:
            self.worker.terminate()
        try:
            self.worker.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            self.worker.kill()
            return {}
        assert self.worker.stderr
        last = self.worker.stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
        try:
            end = json.loads(last)
        except ValueError:
            return {"exit": self.worker.returncode, "said": last[:200]}
        return end if isinstance(end, dict) else {"said": last[:200]}

    def print(self, kind: str, detail: str) -> NoReturn:
        seconds = 0.0 if self.started is None else time.monotonic() - self.started
        verdict = {"kind": kind, "detail": detail, "seconds": round(seconds, 3), "calls": self.calls}
        os.write(self.verdict_to, pack(verdict) + b"\n")
        os._exit(0)


def described(reply: dict[str, Any]) -> str:
    """The exception of a reply as text."""
    return f"{reply['raised']}: {reply.get('text', '')}"[:300].rstrip(": ")


def exception_like(reply: dict[str, Any]) -> Exception:
    """For a `raised` reply, what a test may expect: a builtin exception by its exact name, else `CandidateError`."""
    kind = getattr(builtins, str(reply.get("base", "")), None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(str(reply.get("text", ""))[:200])
        except TypeError:
            pass  # a few, as UnicodeDecodeError, want more than a text
    return CandidateError(described(reply))


def protect(limits: Mapping[str, Any]) -> None:
    """Keep the worker out of this process, and what it sends from growing without bound here."""
    if os.name != "posix":
        return
    from hildanext.grading.sandbox import kernel, restrict

    if restrict.LINUX:
        kernel.prctl("not dumpable", kernel.PR_SET_DUMPABLE, 0)  # /proc/<this>/mem is closed to others of the same user
    # Processor time ends what the watch cannot, a computation that never lets go of the interpreter.
    own = {**limits, "memory_bytes": 1 << 30, "open_files": 64, "cpu_seconds": limits["cpu_seconds"] + 1}
    restrict.set_limits(own)
