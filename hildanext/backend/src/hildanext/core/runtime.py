"""What computes: device, dtype, threads, seed. Chosen by what the machine accelerates, and overridable."""

import os
import platform
import random
import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hildanext.core.errors import ConfigError, UnknownChoice

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
RUNTIMES = ("auto", "torch", "onnx")
"""What computes a model: torch, or ONNX Runtime on the CPU."""
QUANTIZED = ("q8", "q4")
"""Types of weights that ONNX Runtime alone computes with."""
PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "numpy", "safetensors", "gguf", "pydantic")
REPORTED_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16")


THREADS_PER_CORE = 64
"""More is a slip of the pen: the system may refuse to start so many, and torch then ends the program."""

RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""Where launchers say which of several processes this is."""


def is_main_process() -> bool:
    """Whether this process is alone or the first of several: the one that prints and writes."""
    return next((os.environ[name] for name in RANKS if name in os.environ), "0") == "0"


@dataclass(frozen=True)
class RuntimeConfig:
    """What a model is to run on, as a flag or a section says it; "auto" and None are what this machine accelerates."""

    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    runtime: str = "auto"
    """`auto` is torch, but for weights in 8 or 4 bits."""

    @property
    def is_onnx(self) -> bool:
        """Whether ONNX Runtime is asked for. Raises `UnknownChoice`."""
        if self.runtime not in RUNTIMES:
            raise UnknownChoice("runtime", self.runtime, [*RUNTIMES])
        return self.runtime == "onnx" or (self.runtime == "auto" and self.dtype in QUANTIZED)

    def resolve(self) -> "Runtime":
        """Set torch's threads; raises `ConfigError` or `UnknownChoice` for what is not there."""
        if self.is_onnx:
            asked = f"dtype {self.dtype}" if self.runtime == "auto" else "the runtime 'onnx'"
            raise ConfigError(f"{asked} is for writing text alone", "leave it out: torch computes this")
        threads = set_threads(self.threads)
        device = choose_device(self.device)
        return Runtime(device, choose_dtype(self.dtype, device), threads)


@dataclass(frozen=True)
class Runtime:
    """What a model runs on."""

    device: "torch.device"
    dtype: "torch.dtype"
    threads: int


def choose_device(name: str = "auto") -> "torch.device":
    """The device of that name; "auto" takes CUDA, then Apple's MPS, then the CPU. Raises `ConfigError`."""
    import torch

    if name == "auto":
        if torch.cuda.is_available() and cuda_is_built_for(torch.device("cuda:0")):
            return torch.device("cuda:0")
        return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"unknown device {name!r}", "choices: auto, cpu, cuda, cuda:0, mps") from None
    if device.type == "cuda":
        if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"device {name!r} is not there", "hildanext doctor says why; set device to cpu")
        if not cuda_is_built_for(device):
            raise ConfigError(
                f"this torch has no kernels for {name!r}", "install a CUDA 12.6 build of torch; see hildanext doctor"
            )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device 'mps' is not there", "set device to cpu")
    return device


def cuda_is_built_for(device: "torch.device") -> bool:
    """Whether the installed torch has kernels for this GPU (Pascal needs the CUDA 12.6 builds or older)."""
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    return capability_is_covered(major, minor, torch.cuda.get_arch_list())


def capability_is_covered(major: int, minor: int, arch_list: list[str]) -> bool:
    """`sm_XY` runs on the same major with a minor >= Y; `compute_XY` (PTX) on anything newer."""
    for arch in arch_list:
        kind, _, number = arch.rstrip("af").partition("_")
        if not number.isdigit():
            continue
        has_major, has_minor = int(number[:-1]), int(number[-1])
        if kind == "sm" and has_major == major and has_minor <= minor:
            return True
        if kind == "compute" and (has_major, has_minor) <= (major, minor):
            return True
    return False


def choose_dtype(name: str, device: "torch.device") -> "torch.dtype":
    """The dtype of that name; "auto" is bf16 where the device computes in it, else fp32. Raises `UnknownChoice`."""
    import torch

    if name == "auto":
        name = "bf16" if accelerates_bf16(device) else "fp32"
    if name not in DTYPES:
        raise UnknownChoice("dtype", name, [*DTYPES, "auto"])
    dtype: torch.dtype = getattr(torch, DTYPES[name])
    return dtype


def accelerates_bf16(device: "torch.device") -> bool:
    """True for Ampere and newer, and for CPUs with AVX512-BF16 or AMX; false for Pascal and other CPUs."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        return bool({"avx512_bf16", "amx_bf16"} & cpu_flags())
    return False


@lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """Instruction sets of this CPU, in Linux's spelling; where Linux does not tell, what torch knows."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith(("flags", "features")):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass  # not Linux: torch's own probes below
    import torch

    capability = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "")()
    known = {"AVX2": {"avx2"}, "AVX512": {"avx2", "avx512f"}}.get(str(capability).upper(), set())
    for flag, probe in (("avx512_bf16", "_is_avx512_bf16_supported"), ("amx_bf16", "_is_amx_tile_supported")):
        if getattr(torch.cpu, probe, lambda: False)():
            known = known | {flag}
    return frozenset(known)


def set_threads(count: int | None = None) -> int:
    """Set torch's threads (None: `OMP_NUM_THREADS`, else the cores this process may use). Returns the number set."""
    import torch

    if count is None:
        limit = os.environ.get("OMP_NUM_THREADS", "")
        count = int(limit) if limit.isdigit() and int(limit) > 0 else usable_cores()
    most = THREADS_PER_CORE * usable_cores()
    if not 1 <= count <= most:
        raise ConfigError(f"threads = {count}", f"give 1 to {most} on this machine")
    torch.set_num_threads(count)
    return count


def usable_cores() -> int:
    """Cores this process may run on (an affinity mask or a container may hide some)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory instead of handing it back; returns whether that was possible.

    A training step frees and asks again for the same gigabytes; every round trip through the kernel faults each page
    anew. A SmolLM2 step on a CPU took 3.7 s of processor time without and 3.2 to 3.5 s with it. Other C libraries
    are left alone.
    """
    import ctypes

    trim_threshold, top_pad, mmap_max = -1, -2, -4  # names of mallopt(3)
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 (absent from other C libraries)
        settings = ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**28))
        return all(library.mallopt(name, value) == 1 for name, value in settings)
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no handle for the program itself
        return False


def available_memory(device: "torch.device") -> int:
    """Bytes that could be allocated on a device now without pushing anything out."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return min(int(psutil.virtual_memory().available), *container_limits())


def total_memory(device: "torch.device") -> int:
    """Bytes a device has, whoever uses them now."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    import psutil

    return min(int(psutil.virtual_memory().total), *container_limits())


def resident_mib() -> float:
    """Memory that this process holds now, in MiB; of a GPU's nothing."""
    import psutil

    return float(psutil.Process().memory_info().rss) / 2**20


def container_limits(groups: str | Path = "/sys/fs/cgroup", own: str | Path = "/proc/self/cgroup") -> list[int]:
    """What the control groups (v2) around this process let it use in bytes, the innermost first; a machine's own
    memory says nothing of it. At least one entry: as much as can be counted where nothing is limited."""
    root = Path(groups)
    try:
        lines = Path(own).read_text().splitlines()
    except OSError:  # no Linux
        lines = []
    inner = root / next((line[3:].lstrip("/") for line in lines if line.startswith("0::")), "")
    limits = []
    for place in (inner, *inner.parents):
        if place != root and root not in place.parents:
            break
        try:
            limits.append(int((place / "memory.max").read_text()))
        except (OSError, ValueError):  # the outermost has none; "max" is no limit
            continue
    return limits or [sys.maxsize]


def cap_allocator(device: "torch.device", fraction: float | None) -> None:
    """Let torch take at most this share of a GPU's memory; None is no cap. To be called before the first allocation.

    Beyond it an allocation fails, where a Windows driver would else go on in the computer's memory at a crawl.
    Raises `ConfigError` for a device without such an allocator.
    """
    import torch

    if fraction is None:
        return
    if device.type != "cuda":
        raise ConfigError(
            f"max_vram_fraction = {fraction} caps the memory of a GPU, and this run is on {device}",
            "leave it out, or choose a GPU",
        )
    torch.cuda.set_per_process_memory_fraction(fraction, device.index)  # None: the current one


def send(values: Any, device: "torch.device", dtype: "torch.dtype | None" = None) -> "torch.Tensor":
    """A tensor of host values on a device, without waiting for the device to be done with what it was given before.

    Safe from ordinary memory: what is to be copied has been read when the call returns.
    """
    import torch

    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch. Our own code draws from explicit generators; this is for the libraries."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def make_generator(*keys: int) -> "torch.Generator":
    """A CPU generator that depends on all keys (seed, stream, index, ...)."""
    import numpy
    import torch

    entropy = [len(keys), *keys]  # numpy pads with zeros, so (0, 1) and (0, 1, 0) would be the same
    state = numpy.random.SeedSequence(entropy).generate_state(1, numpy.uint64)[0]
    return torch.Generator().manual_seed(int(state) % (2**63))


def versions() -> dict[str, str]:
    """Python and the packages that can change a number; "" where one is not installed."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = ""
    return installed


def machine(
    device: "torch.device | None" = None, dtype: "torch.dtype | None" = None, threads: int | None = None
) -> dict[str, Any]:
    """What a result was measured on: versions, device, dtype, threads (None: torch's), CPU. JSON types only."""
    import torch

    device = device if device is not None else choose_device("auto")
    dtype = dtype if dtype is not None else choose_dtype("auto", device)
    return {
        "versions": versions(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": sys.version.split()[0],
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads() if threads is None else threads,
        "cores": usable_cores(),
        "cpu_flags": [flag for flag in REPORTED_FLAGS if flag in cpu_flags()],
    }


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
