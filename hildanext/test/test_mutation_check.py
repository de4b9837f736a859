"""The mutants cannot rot: each one's text is in its file once. Running them is left to the script."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SCRIPTS = TESTS.parent / "scripts"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec = importlib.util.spec_from_file_location("mutation_check", SCRIPTS / "mutation_check.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPTS))
    return module


def test_every_mutant_s_text_is_in_its_file_once(script):
    script.check_texts(script.TREE)
    names = [(mutant.file, mutant.name) for mutant in script.MUTANTS]
    assert len(set(names)) == len(names) >= 40


def test_a_broken_file_is_still_python_and_its_tests_exist(script):
    for mutant in script.MUTANTS:
        source = (script.TREE / script.PACKAGE / mutant.file).read_text(encoding="utf-8")
        ast.parse(source.replace(mutant.old, mutant.new))
        assert mutant.tests and all((TESTS / name).is_file() for name in mutant.tests)


def test_a_text_that_is_gone_or_there_twice_is_an_error(script, monkeypatch):
    good = script.MUTANTS[0]
    monkeypatch.setattr(
        script, "MUTANTS", [good._replace(old="no such text"), good._replace(name="twice", old="return")]
    )
    with pytest.raises(SystemExit, match="0 times\n.*twice: the text is there"):
        script.check_texts(script.TREE)


def test_what_becomes_of_a_mutant(script, tmp_path):
    """In a tree of one module and one test: noticed, not noticed, and a test that cannot run."""
    package, tests = tmp_path / script.PACKAGE, tmp_path / script.TESTS
    package.mkdir(parents=True)
    tests.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "sums.py").write_text("def add(a, b):\n    return a + b  # and nothing else\n")
    (tests / "test_sums.py").write_text(
        "from hildanext.sums import add\n\ndef test_add():\n    assert add(1, 2) == 3\n"
    )
    program = (
        "import json, pathlib, sys, mutation_check as m; "
        "mutants = [m.Mutant(*row[:4], (row[4],)) for row in json.loads(sys.argv[1])]; "
        "m.run(mutants, pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]))"
    )
    mutants = [
        ("less", "sums.py", "a + b", "a - b", "test_sums.py"),
        ("a comment", "sums.py", "nothing", "no more", "test_sums.py"),
        ("no test", "sums.py", "a + b", "a - b", "test_none.py"),
    ]
    arguments = [json.dumps(mutants), str(tmp_path), str(tmp_path / "out.json")]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, env=environment, capture_output=True)
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["result"] for row in rows[:2]] == ["killed", "survived"] and rows[2]["result"].startswith("error")
    assert rows[0]["by"] == "test_sums.py::test_add"
    assert "a + b  # and nothing else" in (package / "sums.py").read_text()
