"""The container file and the systemd unit say what the package understands."""

import argparse
import json
import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from hildanext.serve.settings import ServeKnobs
from hildanext.verbs import serve

ROOT = Path(__file__).parents[2]
CONTAINER = (ROOT / "Containerfile").read_text(encoding="utf-8")
UNIT = re.search(r"```ini\n(.*?)```", (ROOT / "hildanext/docs/serving.md").read_text(encoding="utf-8"), re.S).group(1)


def settings_of(arguments: list[str]) -> ServeKnobs:
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


def test_the_unit_starts_what_the_package_understands():
    command = re.search(r"^ExecStart=(.*)$", UNIT, re.M).group(1)
    settings = settings_of(shlex.split(command)[1:])
    assert settings.api_key_env == "HILDA_API_KEY" and settings.parent is None
    assert int(re.search(r"TimeoutStopSec=(\d+)", UNIT).group(1)) > settings.shutdown_seconds
