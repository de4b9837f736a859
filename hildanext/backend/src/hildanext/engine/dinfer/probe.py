"""Whether dInfer can be used here, found out without being hurt by it: importing it may fail, crash or hang.

Each check gives the reason in words, or nothing where all is well. Loads no torch in this process.
"""

import importlib.metadata
import importlib.util
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hildanext.core.json_text import parse
from hildanext.engine.dinfer.config import PINNED, DInferConfig

ARCHITECTURES = ("LLaDAModelLM", "LLaDAMoeModelLM", "LLaDA2MoeModelLM")
"""What dInfer has code for. LLaDA 1 and the mixtures of experts of LLaDA 1 and 2."""

LEAST_CAPABILITY = (7, 0)
"""vLLM, which dInfer imports whatever model it runs, has kernels from Volta on; none for Pascal."""

PROBE = """
import importlib, importlib.metadata, importlib.util, inspect, json
report = {}
def note(name, look):
    try:
        report[name] = look()
    except (ImportError, OSError, RuntimeError, AttributeError, TypeError, AssertionError, ValueError) as problem:
        report["errors"] = {**report.get("errors", {}), name: f"{type(problem).__name__}: {problem}"[:300]}
def capabilities():
    import torch
    return [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
def parameters():
    module = importlib.import_module("dinfer")
    return {name: list(inspect.signature(getattr(module, name).__init__).parameters)[1:]
            for name in ("SamplingParams", "DiffusionLLMServing")}
def commit():
    text = importlib.metadata.distribution("dinfer").read_text("direct_url.json")
    return parse(text)["vcs_info"]["commit_id"] if text else None
note("capabilities", capabilities)
for name in ("vllm", "sglang"):
    note(name, lambda: importlib.util.find_spec(name) is not None)
note("parameters", parameters)
try:
    note("commit", commit)
except (LookupError, importlib.metadata.PackageNotFoundError):
    pass
print("PROBE " + json.dumps(report))
"""
"""Run by a Python of its own; one line of JSON behind the word PROBE."""

NEEDED = {
    "SamplingParams": {"threshold", "cache", "mask_id", "eos_id", "use_bd", "cont_weight", "max_length"},
    "DiffusionLLMServing": {"model", "model_type", "sample_params", "backend"},
}


@dataclass(frozen=True)
class ProbeResult:
    """What a probe came back with. `died` says why it did not."""

    capabilities: tuple[tuple[int, int], ...] = ()
    vllm: bool = False
    sglang: bool = False
    parameters: Mapping[str, list[str]] | None = None
    commit: str | None = None
    errors: Mapping[str, str] | None = None
    died: str = ""


def installed() -> bool:
    """Whether there is a package of that name at all, empty or not. Imports nothing."""
    return importlib.util.find_spec("dinfer") is not None or bool(placeholder())


def placeholder() -> str:
    """What is installed in its place, in words; empty where that is dInfer or nothing. Imports nothing.

    The package index has a `dinfer` of another hand with nothing in it, not even a module of that name.
    """
    try:
        version = importlib.metadata.version("dinfer")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    spec = importlib.util.find_spec("dinfer")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    if any((Path(folder) / "decoding").is_dir() for folder in folders) or (spec is None and not version):
        return ""
    return (
        f"the package dinfer {version or 'that is installed'} is an empty placeholder of that name, not inclusionAI's "
        "dInfer: uninstall it, and install github.com/inclusionAI/dInfer"
    )


_probing = threading.Lock()
_probed: dict[float, ProbeResult] = {}


def probe(seconds: float = 120.0) -> ProbeResult:
    """What `probe_in_subprocess` finds, which happens once in this process, however many ask at the same time."""
    with _probing:
        if seconds not in _probed:
            _probed[seconds] = probe_in_subprocess(seconds)
        return _probed[seconds]


def probe_in_subprocess(seconds: float = 120.0) -> ProbeResult:
    """Import dInfer in a Python of its own, which is killed after so many seconds; a placeholder is not imported."""
    if instead := placeholder():
        return ProbeResult(died=instead)
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return ProbeResult(died=f"importing it took more than {seconds:g} s")
    except OSError as problem:
        return ProbeResult(died=f"no Python could be started to import it ({problem})")
    line = next((line for line in done.stdout.splitlines() if line.startswith("PROBE ")), None)
    if line is None:
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        return ProbeResult(died=f"importing it ended Python with {done.returncode} ({last[:200]})")
    answer = parse(line.removeprefix("PROBE "))
    return ProbeResult(
        capabilities=tuple((int(major), int(minor)) for major, minor in answer.get("capabilities", [])),
        vllm=bool(answer.get("vllm")),
        sglang=bool(answer.get("sglang")),
        parameters=answer.get("parameters"),
        commit=answer.get("commit"),
        errors=answer.get("errors"),
    )


def why_not_here(result: ProbeResult, backend: str, commit: str | None) -> str:
    """What stands against dInfer on this machine; empty where nothing does. `commit` None takes any."""
    if result.died:
        return result.died
    if not result.capabilities:
        return "no CUDA device"
    if min(result.capabilities) < LEAST_CAPABILITY:
        major, minor = min(result.capabilities)
        return f"a GPU of compute capability {major}.{minor}, and vLLM needs 7.0"
    if not result.vllm:
        return "vllm is not installed, and dInfer imports it"
    if backend == "sglang" and not result.sglang:
        return "sglang is not installed, and the backend sglang needs it"
    if result.parameters is None:
        return f"it cannot be imported ({(result.errors or {}).get('parameters', 'no reason given')})"
    for name, needed in NEEDED.items():
        lacking = sorted(needed - set(result.parameters.get(name, [])))
        if lacking:
            return f"its {name} has no {', '.join(lacking)}: another version"
    if commit is not None and result.commit != commit:
        return f"it is commit {result.commit or 'unknown'}, and the adapter knows {commit[:12]}"
    return ""


def why_not_model(model: str, backend: str) -> str:
    """What stands against a model's folder; empty where nothing does."""
    folder = Path(model)
    try:
        config = parse((folder / "config.json").read_bytes(), allow_nan=True, allow_duplicates=True)
    except (OSError, ValueError):
        return f"{model!r} is no folder with a config.json"
    architectures = config.get("architectures") if isinstance(config, dict) else None
    name = architectures[0] if isinstance(architectures, list) and architectures else "nothing"
    if name not in ARCHITECTURES:
        return f"unsupported_architecture: it runs {', '.join(ARCHITECTURES)}, the model is {name}"
    if backend == "sglang" and name != "LLaDA2MoeModelLM":
        return f"its backend sglang runs LLaDA2MoeModelLM only, the model is {name}"
    index = folder / "model.safetensors.index.json"
    try:
        shards = sorted(set(parse(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return "the model has no readable model.safetensors.index.json, without which it loads nothing"
    missing = [shard for shard in shards if not (folder / str(shard)).is_file()]
    return f"the model lacks {missing[0]}" if missing else ""


def model_type(model: str) -> str:
    """dInfer's own word for the architecture of a folder that `why_not_model` has nothing against."""
    config: dict[str, Any] = parse((Path(model) / "config.json").read_bytes(), allow_nan=True, allow_duplicates=True)
    return {"LLaDA2MoeModelLM": "llada2", "LLaDAMoeModelLM": "llada-moe"}.get(config["architectures"][0], "llada")


def why_unavailable(section: Mapping[str, Any], model: str) -> str:
    """Why `auto` does not take dInfer for a model, cheapest question first; empty where it does."""
    if not installed():
        return "it is not installed"
    if instead := placeholder():
        return instead
    unknown = sorted(set(section) - {field.name for field in fields(DInferConfig)} - {"name"})
    if unknown:
        return f"the engine's section sets {unknown[0]}, which it does not know"
    backend = str(section.get("backend", "sglang"))
    return why_not_model(model, backend) or why_not_here(
        probe(float(section.get("probe_seconds", 120.0))), backend, section.get("commit", PINNED)
    )
