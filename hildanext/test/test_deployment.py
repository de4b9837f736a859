"""The container file and the systemd unit say what the package understands."""

import argparse
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from hildanext.commands import serve
from hildanext.serve.settings import ServeConfig

ROOT = Path(__file__).parents[2]
CONTAINER = (ROOT / "Containerfile").read_text(encoding="utf-8")
UNIT = re.search(r"```ini\n(.*?)```", (ROOT / "hildanext/docs/serving.md").read_text(encoding="utf-8"), re.S).group(1)


def settings_of(arguments: list[str]) -> ServeConfig:
    parser = argparse.ArgumentParser()
    serve.configure(parser)
    assert arguments[0] == "serve"
    return serve.settings_of(parser.parse_args(arguments[1:]))


def lines(word: str) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in CONTAINER.splitlines() if line.startswith(word + " ")]


def test_the_container_serves_the_network_with_a_key_and_without_rights():
    settings = settings_of(json.loads(lines("CMD")[0]))
    assert settings.host == "0.0.0.0" and str(settings.port) == lines("EXPOSE")[0] == "8000"
    assert settings.api_key_env == "HILDA_API_KEY" and settings.jobs_folder.startswith(lines("VOLUME")[0])
    assert lines("USER") == ["hilda"] and json.loads(lines("ENTRYPOINT")[0]) == ["hildanext"]
    assert "/health/ready" in CONTAINER and f":{settings.port}/" in CONTAINER


def test_what_the_container_copies_is_there_and_is_let_through():
    for line in lines("COPY"):
        source = line.split()[0]
        assert (ROOT / source / "pyproject.toml").is_file()
        assert f"!{source}" in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()


@pytest.mark.skipif(shutil.which("sh") is None, reason="no shell")
@pytest.mark.parametrize("index, words", [("", []), ("https://a.test/cpu x", ["--index-url", "https://a.test/cpu x"])])
def test_torch_comes_from_the_index_that_is_named_or_from_the_usual_one(index, words):
    (command,) = re.findall(r"(pip install .*torch.*)", CONTAINER)
    script = f'pip() {{ printf "%s\\n" "$@"; }}; {command}'
    said = subprocess.run(
        ["sh", "-euc", script], env={"TORCH_INDEX": index}, capture_output=True, text=True, check=True
    )
    assert said.stdout.splitlines() == ["install", *words, "torch>=2.4"]
    assert CONTAINER.index("ARG TORCH_INDEX") > CONTAINER.index("FROM "), "an argument before FROM is unknown behind it"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd")
def test_systemd_finds_no_fault_in_the_unit(tmp_path):
    path = tmp_path / "hilda.service"
    path.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", UNIT, flags=re.M))
    said = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True, timeout=60)
    assert said.returncode == 0 and "hilda.service" not in said.stderr, said.stderr


def test_the_unit_starts_what_the_package_understands():
    command = re.search(r"^ExecStart=(.*)$", UNIT, re.M).group(1)
    settings = settings_of(shlex.split(command)[1:])
    assert settings.api_key_env == "HILDA_API_KEY" and settings.parent is None
    assert int(re.search(r"TimeoutStopSec=(\d+)", UNIT).group(1)) > settings.shutdown_seconds
