"""A server of one's own to measure: `hildanext serve` in another process, on a free port of this machine alone."""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hildanext.core.errors import HildaError

START_SECONDS = 600.0
"""For loading the models."""
LINGER_SECONDS = 30.0
"""Between being told to end and being ended."""
LOOK_SECONDS = 0.05


class ServerFailed(HildaError):
    """The server did not start."""


@contextmanager
def own_server(
    section: Mapping[str, Any], say: Callable[[str], None] | None = None, patience: float = START_SECONDS
) -> Iterator[str]:
    """The address of a server that is ready; it ends with the block, whatever happens there.

    `section` is its section `serve`, of which address, key and jobs are this function's. Raises `ServerFailed` with
    what it said where it ends before it is ready, or is not ready in time.
    """
    own = {"host": "127.0.0.1", "hosts": None, "port": 0, "api_key_env": None, "jobs_folder": None}
    with tempfile.TemporaryDirectory(prefix="hilda-bench-") as name:
        folder = Path(name)
        (folder / "serve.json").write_text(json.dumps({"serve": {**section, **own}}), encoding="utf-8")
        command = [sys.executable, "-m", "hildanext.cli", "serve", "--config", str(folder / "serve.json")]
        with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        try:
            line = _startup_line(process, folder, patience)
            if say is not None:
                say(line)
            yield line.split(" ", 1)[0]
        finally:
            _end(process)


def _startup_line(process: "subprocess.Popen[bytes]", folder: Path, patience: float) -> str:
    """What the server says once it answers: its address comes first."""
    until = time.monotonic() + patience
    while True:
        ended = process.poll()  # asked first: what was said before the end is then in the file
        output = _text(folder / "out")
        if "\n" in output and re.match(r"http://\S+ serves ", output):
            return output.split("\n", 1)[0]
        if ended is not None:
            last = ([line for line in _text(folder / "err").splitlines() if line.strip()] or ["it said nothing"])[-1]
            raise ServerFailed(f"the server did not start ({last.removeprefix('error: ')})", "see hildanext serve")
        if time.monotonic() > until:
            raise ServerFailed(f"the server was not ready after {patience:g} s", "start it yourself and give its --url")
        time.sleep(LOOK_SECONDS)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(LINGER_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
