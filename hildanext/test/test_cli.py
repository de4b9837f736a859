"""The command line, in process: exit codes, one line per error, nothing lost."""

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from rich.table import Table

from hildanext import __version__
from hildanext.cli import VERBS, main
from hildanext.commands import doctor
from hildanext.core.console import wide_console
from hildanext.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "hildanext" / "runs" / "configs").rglob("*.json"))


def test_without_a_verb_it_prints_its_help(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in VERBS)


def test_the_version_is_the_package_s(capsys):
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("environment", "count"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_threads_soon_sleep_where_they_wait_unless_the_environment_says_otherwise(
    environment, count, monkeypatch, capsys
):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "to be undone")
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["--version"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == count


@pytest.mark.parametrize("arguments", [["frobnicate"], ["run", "--frobnicate"], ["doctor", "extra"]])
def test_what_it_does_not_know_is_exit_2(arguments, capsys):
    assert main(arguments) == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_an_error_of_a_flag_shows_the_verb_s_usage(verb, capsys):
    action = {"jobs": ["list"], "models": ["list"], "bench": ["train"], "pull": ["tiny"]}.get(verb, [])
    needs = {
        "convert": ["--out", "x"],
        "sft": ["--out", "x"],
        "rl": ["--out", "x"],
        "explain-graph": ["x"],
        "export": ["x", "--out", "x"],
    }.get(verb, [])
    assert main([verb, *action, *needs, "--frobnicate"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"usage: hildanext {verb}") and "--frobnicate" in error.splitlines()[-1]


def test_what_stands_in_no_terminal_is_not_wrapped(capsys, tmp_path):
    console, long = wide_console(), "word " * 500
    console.print(long)
    table = Table("name", "place")
    table.add_row("x" * 100, "y" * 300)
    console.print(table)
    shown = capsys.readouterr().out
    assert long in shown and "x" * 100 in shown and "y" * 300 in shown


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["run"], "no run was named"),
        (["run", "nothing.json"], "no such file 'nothing.json'"),
        (["check", "nothing.json"], "no such file"),
        (["check", "--config", "."], "cannot read"),
    ],
)
def test_a_missing_config_is_one_line_and_exit_2(arguments, word, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and word in error


def written(folder: Path, **run: object) -> str:
    path = folder / "run.json"
    path.write_text(json.dumps({"folder": str(folder / "out"), "stages": [{"stage": "prepare"}], **run}))
    return str(path)


@pytest.mark.parametrize(
    "run, assignment, word",
    [
        ({"seeed": 1}, None, "did you mean 'seed'"),
        ({"seed": "x"}, None, "seed"),
        ({}, "seed=minus", "seed"),
        ({}, "nothing", "--set"),
        ({"stages": [{"stage": "prepar"}]}, None, "did you mean 'prepare'"),
        ({"stages": [{"stage": "sft", "losses": [{"name": "m2t"}, {"name": "c2dlm"}]}]}, None, "FULL method"),
    ],
)
@pytest.mark.parametrize("verb", ["check", "run"])
def test_a_run_that_does_not_validate_is_one_line_and_exit_2(verb, run, assignment, word, tmp_path, capsys):
    more = ["--set", assignment] if assignment else []
    assert main([verb, written(tmp_path, **run), *more]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and word in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_of_the_repository_holds(path, capsys):
    assert main(["check", str(path)]) == 0, capsys.readouterr().err


def test_check_takes_the_sections_of_a_single_verb_too(tmp_path, capsys):
    path = tmp_path / "convert.json"
    sections = {"convert": {"parent": "tiny", "wsd": [{"phase": "stable", "block_size": 32, "tokens": 64}]}, "data": {}}
    path.write_text(json.dumps(sections))
    assert main(["check", str(path)]) == 0, capsys.readouterr().err
    assert main(["check", str(path), "--set", "convert.wsd=[]"]) == 2
    path.write_text(json.dumps({"prepare": {"source": {"name": "text", "path": "x"}, "out": "y"}}))
    assert main(["check", str(path)]) == 0, capsys.readouterr().err


def test_an_error_of_ours_never_shows_a_traceback(monkeypatch, capsys):
    from hildanext.core.errors import ModelError

    def fails(options):
        raise ModelError("a model\nover two lines", "do this")

    monkeypatch.setattr(doctor, "run", fails)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "error: a model over two lines: do this\n"


def test_ctrl_c_in_a_stage_is_130_with_one_line_and_keeps_what_was_done(tmp_path, monkeypatch, capsys):
    stages = types.ModuleType("slow_stages")
    stages.check = lambda section, context: None

    def stage(section, context):
        if section.get("interrupt"):
            raise KeyboardInterrupt
        return {"data": "here"}

    stages.stage = stage
    monkeypatch.setitem(sys.modules, "slow_stages", stages)
    for name in ("prepare", "convert"):
        monkeypatch.setitem(STAGES, name, "slow_stages")
    path = written(tmp_path, stages=[{"stage": "prepare"}, {"stage": "convert", "interrupt": True}])
    assert main(["run", path]) == 130
    error = capsys.readouterr().err
    assert error.startswith("interrupted") and error.count("\n") == 1
    assert json.loads((tmp_path / "out/stages/prepare.done.json").read_text())["outcome"] == {"data": "here"}
    assert not (tmp_path / "out/stages/convert.done.json").exists()


@pytest.mark.skipif(os.name == "nt", reason="signals differ there")
def test_a_real_ctrl_c_ends_the_process_with_130(tmp_path):
    code = (
        "import sys, time, types, hildanext.cli as cli, hildanext.stages as stages\n"
        "m = types.ModuleType('slow'); m.check = lambda s, c: None\n"
        "def stage(s, c):\n    print('inside', flush=True); time.sleep(30)\n"
        "m.stage = stage; sys.modules['slow'] = m; stages.STAGES['prepare'] = 'slow'\n"
        f"sys.exit(cli.main(['run', {written(tmp_path)!r}]))\n"
    )
    # Started from a background job, a process ignores Ctrl-C unless told otherwise.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + code
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "inside" not in (line := process.stdout.readline()):
        assert line, process.stderr.read() if process.stderr else ""
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130 and error == "interrupted: what was written is whole; the same command resumes\n"


class TestDoctor:
    def test_tells_versions_device_and_dtype(self, capsys):
        assert main(["doctor"]) in (0, 1)
        shown = capsys.readouterr().out
        assert all(word in shown for word in ("torch", "transformers", "device", "dtype", "dinfer"))

    def test_json_is_one_object(self, capsys):
        main(["doctor", "--json"])
        report = json.loads(capsys.readouterr().out)
        assert report["machine"]["versions"]["torch"] and {"state", "what", "value", "advice"} == set(
            report["findings"][0]
        )

    def test_a_pascal_gpu_on_a_build_without_its_kernels_is_told_which_build_to_take(self):
        finding = doctor.judge_gpu("cuda:0", "GTX 1080", 6, 1, ["sm_75", "sm_90"])
        assert finding.state == "bad" and "CUDA 12.6" in finding.advice
        assert doctor.judge_gpu("cuda:0", "GTX 1080", 6, 1, ["sm_50", "sm_60"]).state == "note"
        assert doctor.judge_gpu("cuda:0", "A100", 8, 0, ["sm_80"]).state == "ok"

    def test_an_empty_placeholder_is_not_mistaken_for_the_engine(self, monkeypatch):
        monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0.1")
        monkeypatch.setitem(sys.modules, "dinfer", types.ModuleType("dinfer"))
        assert "placeholder" in doctor.probe_optional("dinfer").value
        engine = types.ModuleType("dinfer")
        engine.ThresholdParallelDecoder = object
        monkeypatch.setitem(sys.modules, "dinfer", engine)
        assert doctor.probe_optional("dinfer").state == "ok"

    def test_a_package_that_is_too_old_is_bad_and_says_so(self, monkeypatch):
        monkeypatch.setattr("hildanext.core.runtime.versions", lambda: {"torch": "2.3.1+cpu", "numpy": ""})
        findings = {finding.what: finding for finding in doctor.examine_versions()}
        assert findings["torch"].state == "bad" and "2.4" in findings["torch"].advice
        assert findings["numpy"].state == "bad" and "pip install" in findings["numpy"].advice


class TestRepository:
    def test_the_changelog_begins_with_the_package_s_version(self):
        headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
        assert headings[0] == __version__ == importlib.metadata.version("hildanext")

    def test_versions_requirements_and_floor_agree(self):
        table = dict(
            (cells[1].lower(), cells[2])
            for line in (ROOT / "hildanext/VERSIONS.md").read_text(encoding="utf-8").splitlines()
            if len(cells := [cell.strip() for cell in line.split("|")]) == 5
        )
        floor = dict(re.findall(r"^(\w+)==(\S+)$", (ROOT / "hildanext/backend/floor.txt").read_text(), re.MULTILINE))
        declared = (ROOT / "hildanext/backend/pyproject.toml").read_text(encoding="utf-8")
        for name in ("torch", "transformers"):
            assert table[name] == floor[name]
            least = re.search(rf'"{name}>=([\d.]+)"', declared).group(1)
            assert floor[name].startswith(least)
        for name in ("numpy", "accelerate", "peft", "datasets"):
            least = re.search(rf'"{name}>=([\d.]+)"', declared).group(1)
            assert table[name] == least, name
        assert f'requires-python = ">={table["python"]}"' in declared

    @pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
    @pytest.mark.parametrize(
        "choice, there, said",
        [("cpu", True, "torch 2.9.1+cpu, without"), ("cpu", False, "3 to 6 GB"), ("any", True, "3 to 6 GB")],
    )
    def test_make_takes_torch_for_cpus_or_says_how_large_the_other_is(self, choice, there, said, tmp_path):
        """`python` is a script that writes down its arguments; pip's indexes have a build for CPUs, or none."""
        python = tmp_path / "venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        versions = "2.9.1+cpu, 2.8.0+cpu" if there else "2.9.1, 2.8.0"
        python.write_text(f"""#!/bin/sh
echo "$*" >> {tmp_path}/calls
case "$*" in *"import torch"*) exit 1;; *"index versions torch"*) echo "Available versions: {versions}";; esac
""")
        python.chmod(0o755)
        words = ["make", "install", f"VENV={tmp_path / 'venv'}", f"TORCH={choice}", "PYTHON=python3"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
        installs = [call for call in (tmp_path / "calls").read_text().splitlines() if " install " in f" {call} "]
        assert ["torch==2.9.1+cpu" in call for call in installs] == ([True, False] if "+cpu" in said else [False])
        assert said in done.stdout and (("3 to 6 GB" in done.stdout) == ("3 to 6 GB" in said))

    def test_the_readme_holds_the_four_lines_and_the_two_commands(self):
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        for line in (
            "pip install -e hildanext/backend",
            "python hildanext/test/run_tests.py",
            "hildanext serve --config hildanext/runs/configs/default.json",
            'hildanext generate --prompt "Once upon a time" --mode S_MODE',
            "make demo",
            "make test",
        ):
            assert line in text
