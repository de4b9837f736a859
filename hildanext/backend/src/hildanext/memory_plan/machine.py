"""The machines a plan can be for, and what is assumed of each."""

from dataclasses import dataclass

from hildanext.core.errors import ConfigError, UnknownChoice
from hildanext.core.runtime import accelerates_bf16, choose_device, total_memory

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


CARD = ("pascal", 8 * 2**30)
"""The 8 GB card that is the aim, and what a GPU is taken for where nothing is said of it."""


def this_machine() -> tuple[Machine, int]:
    """What would be chosen here to run on, and its memory in bytes: the GPU's, else the computer's."""
    device = choose_device("auto")
    bf16, on_gpu = accelerates_bf16(device), device.type == "cuda"
    name = ("ampere" if bf16 else "pascal") if on_gpu else ("cpu-bf16" if bf16 else "cpu")
    return MACHINES[name], total_memory(device)


def chosen_machine(name: str | None, memory: str | None) -> tuple[Machine, int]:
    """The machine of that name with so much memory; what is left out is as here, and of a GPU that is not here as
    `CARD` has it. Raises `UnknownChoice`, `ConfigError`.
    """
    here, size = this_machine()
    if name is None and memory is None:
        return here, size
    machine = find_machine(name if name is not None else CARD[0] if here.on_cpu else here.name)
    if memory is not None:
        return machine, read_bytes(memory)
    if machine.on_cpu:
        return machine, total_memory(choose_device("cpu"))
    return machine, size if machine == here else CARD[1]


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
