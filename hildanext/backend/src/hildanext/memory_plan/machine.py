"""The machines a plan can be for, and what is assumed of each."""

from dataclasses import dataclass

from hildanext.core.errors import ConfigError, UnknownChoice

MIB = 2**20
UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": MIB, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


@dataclass(frozen=True)
class Machine:
    """What decides numbers of bytes: the type that is computed in, and what the libraries take for themselves."""

    name: str
    bf16: bool
    framework: int
    on_cpu: bool
    says: str


CONTEXT = 450 * MIB
LIBRARIES = 550 * MIB

MACHINES = {
    "pascal": Machine(
        "pascal", False, CONTEXT, False, "a GPU without bf16 (GTX 10xx, 16xx, 20xx): everything is computed in fp32"
    ),
    "ampere": Machine(
        "ampere", True, CONTEXT, False, "a GPU with bf16 (RTX 30xx and newer): autocast over fp32 weights"
    ),
    "cpu": Machine("cpu", False, LIBRARIES, True, "a CPU without bf16"),
    "cpu-bf16": Machine("cpu-bf16", True, LIBRARIES, True, "a CPU with AVX512-BF16 or AMX: autocast over fp32 weights"),
}


def find_machine(name: str) -> Machine:
    """Raises `UnknownChoice`."""
    if name not in MACHINES:
        raise UnknownChoice("machine", name, MACHINES)
    return MACHINES[name]


def read_bytes(text: str) -> int:
    """`8GiB`, `7500MiB`, `8GB` or a number of bytes. Raises `ConfigError`."""
    number = text.strip().rstrip("bBiIgGmMkK")
    unit = text.strip()[len(number) :].lower()
    try:
        count = int(float(number) * UNITS[unit])
    except (ValueError, KeyError):
        raise ConfigError(f"no amount of memory: {text!r}", "write it as 8GiB, 7500MiB or a number of bytes") from None
    if count <= 0:
        raise ConfigError(f"no amount of memory: {text!r}", "give more than nothing")
    return count


def show_bytes(count: int) -> str:
    """In MiB, or GiB from ten of them."""
    return f"{count / 2**30:.1f} GiB" if count >= 10 * 2**30 else f"{count / MIB:,.0f} MiB"
