"""Break the core in small ways, one at a time, and see which of them no test notices.

python hildanext/scripts/mutation_check.py --list
python hildanext/scripts/mutation_check.py --only masks kv_cache --out mutants.json

Each mutant is one exact text of one file with another in its place. It is put into a temporary copy of the tree, the
tests named with it run there until the first failure, and the file is put back. A mutant is killed when a test fails,
and survives when all pass. The same tests must pass in the copy before anything is broken. Mutants that change no
behaviour are not listed. Exits with 1 unless every mutant is killed.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import accelerate  # noqa: F401  (with the next ones, what the package imports first: a mutant is forked with them)
import hypothesis  # noqa: F401
import pytest
import torch  # noqa: F401
import transformers  # noqa: F401
from mutants import MUTANTS, Mutant

TREE = Path(__file__).parents[2]
SOURCE = Path("hildanext/backend/src")
PACKAGE = SOURCE / "hildanext"
TESTS = Path("hildanext/test")
NEEDED = ("pyproject.toml", "README.md", str(SOURCE), str(TESTS))
TIMEOUT = 900.0
KILLED, SURVIVED = "killed", "survived"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name the mutants and run nothing")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="mutants whose file or name holds one")
    parser.add_argument("--trust", action="store_true", help="the tests pass unbroken: begin with the mutants")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the table as JSON, after every mutant")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if any(text in f"{m.file}: {m.name}" for text in options.only)]
    if options.list:
        for mutant in chosen:
            print(f"{mutant.file}: {mutant.name}")
        return 0
    check_texts(TREE)
    with tempfile.TemporaryDirectory(prefix="hilda-mutants-") as folder:
        copy = Path(folder)
        copy_tree(copy)
        if not options.trust:
            result, failed = outcome(copy, tuple(dict.fromkeys(test for mutant in chosen for test in mutant.tests)))
            if result != SURVIVED:
                raise SystemExit(f"before anything is broken: {result} {failed}")
        rows = run(chosen, copy, options.out)
    killed = sum(row["result"] == KILLED for row in rows)
    print(f"{killed} of {len(rows)} killed")
    return 0 if killed == len(rows) else 1


def check_texts(tree: Path) -> None:
    """Raises `SystemExit` naming every mutant whose text is not in its file exactly once."""
    wrong = []
    for mutant in MUTANTS:
        count = (tree / PACKAGE / mutant.file).read_text(encoding="utf-8").count(mutant.old)
        if count != 1 or mutant.old == mutant.new:
            wrong.append(f"{mutant.file}: {mutant.name}: the text is there {count} times")
    if wrong:
        raise SystemExit("\n".join(wrong))


def copy_tree(to: Path) -> None:
    for name in NEEDED:
        if (TREE / name).is_dir():
            shutil.copytree(TREE / name, to / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(TREE / name, to / name)


def run(mutants: list[Mutant], copy: Path, out: Path | None) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for mutant in mutants:
        path = copy / PACKAGE / mutant.file
        before = path.read_text(encoding="utf-8")
        path.write_text(before.replace(mutant.old, mutant.new), encoding="utf-8")
        started = time.monotonic()
        try:
            result, failed = outcome(copy, mutant.tests)
        finally:
            path.write_text(before, encoding="utf-8")
        shown = f"{result} by {failed}" if failed else result
        seconds = round(time.monotonic() - started, 1)
        rows.append({"name": mutant.name, "file": mutant.file, "result": result, "by": failed, "seconds": seconds})
        print(f"{seconds:6.1f} s  {mutant.file}: {mutant.name}: {shown}", flush=True)
        if out is not None:
            out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


def outcome(copy: Path, tests: tuple[str, ...]) -> tuple[str, str]:
    """What became of the mutant, and the test that failed. The process must not have loaded the package itself."""
    assert "hildanext" not in sys.modules
    log = copy / "pytest.log"
    process = multiprocessing.get_context("fork").Process(target=_run_tests, args=(copy, tests, log))
    process.start()
    process.join(TIMEOUT)
    if process.exitcode is None:
        process.kill()
        return KILLED, f"the clock ({TIMEOUT:g} s)"
    said = log.read_text(encoding="utf-8")
    failed = [line.split(" ", 1)[1] for line in said.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if process.exitcode == pytest.ExitCode.TESTS_FAILED and failed:  # 1 is also how a broken process of ours ends
        return KILLED, failed[0].partition(" - ")[0].removeprefix(f"{TESTS}/")
    if process.exitcode == pytest.ExitCode.OK:
        return SURVIVED, ""
    return f"error: pytest ended with {process.exitcode}", said[-300:]


def _run_tests(copy: Path, tests: tuple[str, ...], log: Path) -> None:
    os.chdir(copy)
    # No bytecode: a file that changes within a second and keeps its length would be taken for the old one.
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(copy / SOURCE), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.path[:0] = [str(copy / SOURCE)]
    with log.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=no", "--rootdir", str(copy)]
        loaded = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins that are there already
        code = pytest.main([*options, *loaded, *(str(TESTS / test) for test in tests)])
    sys.exit(int(code))


if __name__ == "__main__":
    sys.exit(main())
