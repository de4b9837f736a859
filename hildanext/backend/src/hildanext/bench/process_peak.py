"""The most memory that this process has held."""

import sys
from pathlib import Path


def peak_of_process() -> int | None:
    """Bytes; None where the system does not tell."""
    if sys.platform == "linux":  # `ru_maxrss` would be that of the process that started this one, if it was larger
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None
