"""Whatever a command line gets wrong is one line and exit code 2, soon, and nothing is written beside its output."""

import contextlib
import io
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from bad_commands import command_lines, lay_out
from hildanext import cli, training
from hildanext.bench import answer_speed, decode_speed, engine_speed, serve_load, train_speed
from hildanext.core.errors import HildaError
from hildanext.eval import evaluation
from hildanext.serve import server

ROOT = Path(__file__).resolve().parents[3]
CASES = 300
"""For each verb."""
CACHES = {".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache"}
"""Made by tools, perhaps by tests that run beside these."""
SECONDS = 60
JUDGED = {"plan": (1,), "doctor": (1,)}
"""Verbs whose answer may be no: the run does not fit, the machine lacks something."""


class TooLong(BaseException):
    """Raised in whatever a command still does after the time it may take."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where commands run. A training, a measurement, a service would begin, and does not."""
    work = tmp_path / "work"
    work.mkdir()
    lay_out(work)
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    for name, folder in {"HOME": "home", "HILDANEXT_HOME": "home/hilda", "MPLCONFIGDIR": "home/mpl"}.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv(name, str(tmp_path / folder))
    for path, out in {"text.txt": "shards", "good.jsonl": "others"}.items():
        flags = ["--source", "text", "--path", path, "--tokenizer", "tiny", "--out", out, "--quiet"]
        assert cli.main(["prepare", *flags]) == 0

    def begin(*_: object, **__: object) -> None:
        raise HildaError("the work would begin", "that is all")

    monkeypatch.setattr(training._Loop, "_step", begin)
    monkeypatch.setattr(evaluation, "evaluate", begin)
    for measurement in (answer_speed, decode_speed, engine_speed, serve_load, train_speed):
        monkeypatch.setattr(measurement, "measure", begin)
    monkeypatch.setattr(server, "serve", lambda app, bound, ready: app.state.service.engine.close())
    return work


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def call(words: list[str]) -> tuple[int, str, str]:
    """Exit code and what was printed, as if a program had run."""
    out, error = io.StringIO(), io.StringIO()
    logger, threads = logging.getLogger("hildanext"), torch.get_num_threads()
    before = (logger.handlers[:], logger.level, logger.propagate)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), limited(SECONDS):
        code = cli.main(words)
    logger.handlers[:], logger.level, logger.propagate = before
    torch.set_num_threads(threads)
    return code, out.getvalue(), error.getvalue()


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """What lies in the folder but for `out` and `runs`, where the verbs write."""
    found = {}
    for top, folders, names in os.walk(folder):
        if Path(top) == folder:
            folders[:] = [name for name in folders if name not in ("out", "runs")]
        found |= {os.path.join(top, name): (0, 0) for name in folders}
        for name in names:
            about = os.lstat(os.path.join(top, name))
            found[os.path.join(top, name)] = (about.st_size, about.st_mtime_ns)
    return found


def complaints(error: str) -> list[str]:
    """The lines of stderr without the log, and the usage that argparse prints above its own."""
    lines = [line for line in error.splitlines() if line.strip() and not line.startswith(("INFO ", "WARNING "))]
    if lines and lines[0].startswith("usage:"):
        lines = lines[1:]
        while lines and lines[0].startswith("  "):
            lines = lines[1:]
    return lines


def _of_the_checkout() -> dict[str, tuple[int, int]]:
    """What a command must not change."""
    return files(ROOT / "hildanext" / "runs") | dict.fromkeys(set(os.listdir(ROOT)) - CACHES, (0, 0))


@pytest.mark.slow  # what is drawn depends on what is imported: a new fault belongs to whoever looks for one
@pytest.mark.parametrize("verb", cli.VERBS)
@pytest.mark.filterwarnings("ignore")
def test_a_bad_command_is_one_line_and_writes_nothing_elsewhere(verb: str, place: Path):
    before, written = files(place), _of_the_checkout()
    codes: dict[int, int] = {}
    begun = time.monotonic()

    @settings(
        max_examples=CASES, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(command_lines(verb))
    def check(case: tuple[list[str], bytes | None]) -> None:
        words, run = case
        if run is not None:
            Path("run.json").write_bytes(run)
        code, out, error = call(words)
        codes[code] = codes.get(code, 0) + 1
        said = f"{words} with {run!r}: {code}, {error}"
        assert code in (0, 2, *JUDGED.get(verb, ())), said
        assert "Traceback" not in out + error, said
        if code == 2:
            *_, last = complaints(error) or [""]
            assert "error: " in last and len(complaints(error)) == 1, said
        Path("run.json").unlink(missing_ok=True)
        assert files(place) == before, said
        for folder in ("out", "runs"):
            shutil.rmtree(folder, ignore_errors=True)

    check()
    print(f"{verb}: {codes} in {time.monotonic() - begun:.0f} s", file=sys.stderr)
    assert codes.get(2, 0) > sum(codes.values()) / 3 or verb == "doctor"
    assert _of_the_checkout() == written
