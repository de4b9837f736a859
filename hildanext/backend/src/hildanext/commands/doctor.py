"""What this machine can do, what it cannot, why not, and what to do about it.

hildanext doctor
hildanext doctor --json
"""

import argparse
import importlib
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hildanext import __version__
from hildanext.commands import print_json
from hildanext.core.errors import ConfigError

MINIMUM = {"python": (3, 11), "torch": (2, 4), "transformers": (4, 51), "numpy": (1, 26), "pydantic": (2, 0)}

OPTIONAL = {
    "bitsandbytes": ("Linear4bit", "nn", "4-bit weights (QLoRA) and 8-bit AdamW: the extra 'quant'"),
    "kvpress": ("BasePress", "", "comparison with other KV pruners, which this version does not have yet"),
    "dinfer": ("ThresholdParallelDecoder", "", "an engine for LLaDA models on NVIDIA GPUs: serve --engine dinfer"),
}
"""Package to (an attribute only the real thing has, the submodule that holds it, what it is for)."""


@dataclass(frozen=True)
class Finding:
    """One line of the report; `advice` says what to do where something is not well."""

    state: Literal["ok", "note", "bad"]
    what: str
    value: str
    advice: str = ""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(options: argparse.Namespace) -> int:
    """0 when everything that is needed is there, 1 when not."""
    findings = examine()
    if options.json:
        print_json({"findings": [asdict(finding) for finding in findings], "machine": _machine()})
    else:
        marks = {"ok": "ok  ", "note": "note", "bad": "BAD "}
        for finding in findings:
            print(f"{marks[finding.state]} {finding.what:<22} {finding.value}")
            if finding.advice:
                print(f"     {'':<22} -> {finding.advice}")
    return 1 if any(finding.state == "bad" for finding in findings) else 0


def examine() -> list[Finding]:
    """Everything there is to say, most basic first. Each probe that fails becomes a finding, never a traceback."""
    findings = [*examine_versions()]
    if any(f.state == "bad" and f.what == "torch" for f in findings):
        return findings
    return findings + [
        *examine_cpu(),
        *examine_cuda(),
        *examine_arithmetic(),
        *examine_models(),
        *examine_sandbox(),
        *[
            examine_bitsandbytes() if name == "bitsandbytes" else probe_optional(name)
            for name in OPTIONAL
            if name != "dinfer"
        ],
        *examine_engines(),
    ]


def examine_versions() -> list[Finding]:
    from hildanext.core.runtime import versions

    findings = [Finding("ok", "hildanext", __version__)]
    for name, installed in versions().items():
        least = MINIMUM.get(name)
        if not installed:
            findings.append(Finding("bad", name, "not installed", "pip install -e hildanext/backend"))
        elif least and release(installed) < least:
            needed = ".".join(map(str, least))
            findings.append(Finding("bad", name, installed, f"install {name} {needed} or newer"))
        else:
            findings.append(Finding("ok", name, installed))
    return findings


def release(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.4.1+cpu" is (2, 4, 1)."""
    numbers = []
    for part in text.split("+")[0].split("."):
        digits = "".join(c for c in part if c.isdigit())
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def examine_cpu() -> list[Finding]:
    from hildanext.core.runtime import REPORTED_FLAGS, cpu_flags, cpu_name, usable_cores

    flags = " ".join(flag for flag in REPORTED_FLAGS if flag in cpu_flags())
    return [
        Finding("ok", "cpu", f"{cpu_name()}, {usable_cores()} cores usable"),
        Finding("ok" if flags else "note", "cpu instructions", flags or "none that we look for"),
    ]


def examine_cuda() -> list[Finding]:
    import torch

    if torch.version.cuda is None:
        return [Finding("note", "cuda", "this torch is built without CUDA", "for an NVIDIA GPU install a CUDA build")]
    if not torch.cuda.is_available():
        return [Finding("note", "cuda", f"torch has CUDA {torch.version.cuda}, but no usable GPU or driver was found")]
    findings = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        total = torch.cuda.get_device_properties(index).total_memory / 2**30
        name = f"{torch.cuda.get_device_name(index)} (sm_{major}{minor}, {total:.1f} GiB)"
        findings.append(judge_gpu(f"cuda:{index}", name, major, minor, torch.cuda.get_arch_list()))
    return findings


def judge_gpu(what: str, name: str, major: int, minor: int, arch_list: list[str]) -> Finding:
    """Whether the installed torch has kernels for a GPU of that compute capability."""
    from hildanext.core.runtime import capability_is_covered

    if capability_is_covered(major, minor, arch_list):
        advice = "" if major >= 8 else "computes in fp32: this GPU does not accelerate bf16"
        return Finding("ok" if major >= 8 else "note", what, name, advice)
    advice = f"this torch has kernels for {' '.join(arch_list) or 'nothing'} only; "
    if major < 7:
        advice += "Pascal and Maxwell need torch <= 2.14 built for CUDA 12.6 or older"
    else:
        advice += "install another CUDA build of torch"
    return Finding("bad", what, name, advice)


def examine_arithmetic() -> list[Finding]:
    from hildanext.core.runtime import accelerates_bf16, choose_device, choose_dtype

    device = choose_device("auto")
    dtype = str(choose_dtype("auto", device)).removeprefix("torch.")
    findings = [Finding("ok", "device", str(device)), Finding("ok", "dtype", f"{dtype} (chosen for {device})")]
    if accelerates_bf16(device):
        findings.append(Finding("ok", "bf16", "accelerated"))
    else:
        findings.append(Finding("note", "bf16", "not accelerated", "fp32 is chosen; bf16 works, but is slower here"))
    return findings


def examine_models() -> list[Finding]:
    from importlib.resources import files

    tiny = files("hildanext") / "assets" / "tiny"
    here = all((tiny / kind / "config.json").is_file() for kind in ("ar", "diffusion"))
    if here:
        return [Finding("ok", "model tiny", "shipped with the package")]
    advice = "python hildanext/scripts/train_tiny.py makes it"
    return [Finding("bad", "model tiny", "missing from this installation", advice)]


def examine_sandbox() -> list[Finding]:
    """How far generated programs can be locked up here (HumanEval, rewards for code)."""
    from hildanext.grading.sandbox.run import probe

    isolation = probe()
    why = isolation.why_not_higher()
    state: Literal["ok", "note"] = "ok" if isolation.level == 3 else "note"
    if isolation.level == 0:
        why += "; generated programs are refused here unless unsafe execution is allowed"
    return [Finding(state, "sandbox", isolation.describe(), why)]


def probe_optional(name: str) -> Finding:
    """Look for an attribute only the real package has: an index may hold an empty placeholder of that name."""
    from importlib.metadata import PackageNotFoundError, version  # 17 ms, which --help need not take

    attribute, submodule, purpose = OPTIONAL[name]
    try:
        installed = version(name)
    except PackageNotFoundError:
        return Finding("note", name, "not installed", f"optional: {purpose}")
    try:
        module = importlib.import_module(f"{name}.{submodule}" if submodule else name)
    except (ImportError, OSError, RuntimeError, AttributeError) as problem:
        return Finding("note", name, f"{installed}, cannot be imported ({type(problem).__name__}: {problem})", purpose)
    if not hasattr(module, attribute):
        return Finding(
            "note", name, f"{installed}, an empty placeholder and not the engine", f"uninstall it; {purpose}"
        )
    return Finding("ok", name, installed)


def examine_engines() -> list[Finding]:
    """What `serve` can answer with, and why not. Another process imports dInfer: it may crash or hang."""
    from hildanext.engine.dinfer import probe as dinfer_probe
    from hildanext.engine.dinfer.config import PINNED

    findings = [
        Finding("ok", "engine local", "runs converted models here; auto takes it unless another fits"),
        Finding("ok", "engine openai", "asks any OpenAI-compatible server: engine.base_url names it"),
    ]
    advice = OPTIONAL["dinfer"][2]
    if not dinfer_probe.installed():
        return [*findings, Finding("note", "engine dinfer", "not used: it is not installed", f"optional: {advice}")]
    why_not = dinfer_probe.why_not_here(dinfer_probe.probe(), "sglang", PINNED)
    if why_not:
        return [*findings, Finding("note", "engine dinfer", f"not used: {why_not}", f"optional: {advice}")]
    return [*findings, Finding("ok", "engine dinfer", "usable for LLaDA models")]


def examine_bitsandbytes() -> Finding:
    """Installed, and able to pack and unpack on the device that would be chosen here?"""
    from hildanext.core.runtime import choose_device
    from hildanext.models.quantize import bitsandbytes_on

    finding, device = probe_optional("bitsandbytes"), choose_device("auto")
    if finding.state != "ok":
        return finding
    try:
        bitsandbytes_on(device)
    except ConfigError as problem:
        return Finding("note", finding.what, f"{finding.value}; {problem.message}", problem.hint)
    return Finding("ok", finding.what, f"{finding.value}, works on {device}")


def _machine() -> dict[str, Any]:
    from hildanext.core.runtime import machine

    return machine()
