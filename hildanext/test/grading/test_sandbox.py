"""Every hostile program, what comes of it, and what is left of it: nothing."""

import glob
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hildanext.grading.sandbox import run as sandbox_run
from hildanext.grading.sandbox.limits import Verdict
from hildanext.grading.sandbox.run import judge, probe
from hostile import ATTACKS, ROWS, Row

LEVEL = probe().level
filtered = pytest.mark.skipif(LEVEL not in (1, 3), reason=f"no filter on system calls: {probe().why_not_higher()}")

MARK = "hilda-hostile-" + os.urandom(8).hex()


def ours() -> list[str]:
    """Command lines of processes that this file's programs left running, anywhere on the machine."""
    commands = []
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            line = Path(path).read_bytes()
        except OSError:
            continue
        if MARK.encode() in line:
            commands.append(line.replace(b"\0", b" ").decode(errors="replace")[-200:])
    return commands


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module", autouse=True)
def marked():
    """Every process of this file carries the mark on its command line."""
    patch = pytest.MonkeyPatch()
    patch.setattr(sandbox_run, "_BOOT", f"{sandbox_run._BOOT}  # {MARK}")
    yield
    patch.undo()


def run_rows(rows: list[Row], mechanisms: tuple[str, ...]) -> dict[str, Verdict]:
    with ThreadPoolExecutor(6) as pool:
        verdicts = pool.map(lambda row: judge(row.job(), row.limits(), mechanisms), rows)
        return {row.name: verdict for row, verdict in zip(rows, verdicts, strict=True)}


@pytest.fixture(scope="module")
def outcome(marked) -> dict:
    """All rows at the level of this machine, side by side, and the machine before and after."""
    before = resident_bytes(), set(os.listdir(tempfile.gettempdir()))
    verdicts = run_rows(ROWS + ATTACKS, probe().mechanisms)
    return {"verdicts": verdicts, "grown": resident_bytes() - before[0], "left": ours(), "files": before[1]}


@filtered
@pytest.mark.parametrize("row", ROWS + ATTACKS, ids=lambda row: row.name)
def test_hostile_program(row, outcome):
    if row.level > LEVEL:
        pytest.skip(f"needs level {row.level}: {probe().why_not_higher()}")
    verdict = outcome["verdicts"][row.name]
    assert verdict.kind in row.kinds, verdict
    if verdict.kind == "timeout":
        assert row.seconds <= verdict.seconds <= row.seconds + 1


@filtered
def test_no_escape_sequence_reaches_a_terminal(outcome):
    assert outcome["verdicts"]["raises escape sequences"].detail == "ValueError: ?[2J???"
    assert all(verdict.detail.isprintable() for verdict in outcome["verdicts"].values())


@filtered
def test_nothing_is_left_running(outcome):
    assert outcome["left"] == []


@filtered
def test_nothing_is_left_on_disk_and_nothing_was_touched(outcome):
    new = set(os.listdir(tempfile.gettempdir())) - outcome["files"]
    assert not [name for name in new if name.startswith("hilda-sandbox-") or name in ("x", "big", "hostile")]
    assert not Path("/tmp/hostile").exists() and not Path(tempfile.gettempdir(), "../../x").exists()


@filtered
def test_this_process_did_not_grow(outcome):
    assert outcome["grown"] < 50 << 20


@pytest.mark.slow
@pytest.mark.skipif("seccomp" not in probe(("namespaces",)).mechanisms, reason="no filter on system calls here")
def test_hostile_programs_without_namespaces():
    verdicts = run_rows([row for row in ROWS + ATTACKS if row.level == 1], probe(("namespaces",)).mechanisms)
    kinds = {row.name: row.kinds for row in ROWS + ATTACKS}
    assert {name: verdict for name, verdict in verdicts.items() if verdict.kind not in kinds[name]} == {}
    assert ours() == []
