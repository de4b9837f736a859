"""Graphs in ONNX Runtime: sessions on so many threads, and tensors bound to them without a copy.

onnxruntime is imported when the first session is made.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from hildanext.core.errors import ConfigError
from hildanext.core.runtime import cpu_flags

OLDEST = (1, 22)
"""The first version whose CPU kernels multiply block-wise 8-bit matrices."""
DOT_PRODUCTS = frozenset({"avx512_vnni", "avx_vnni", "asimddp", "i8mm", "amx_int8"})
"""Instruction sets, in Linux's spelling, that add up signed 8-bit products without saturating."""
NUMPY = {torch.float32: "float32", torch.int64: "int64"}


def load_onnxruntime() -> Any:
    """The package. Raises `ConfigError` where it is not installed or too old."""
    try:
        ort = importlib.import_module("onnxruntime")
    except ImportError:
        raise ConfigError("the runtime 'onnx' needs onnxruntime", 'pip install "hildanext[onnx]"') from None
    found = tuple(int(part) for part in ort.__version__.split(".")[:2])
    if found < OLDEST:
        raise ConfigError(
            f"onnxruntime {ort.__version__} has no 8-bit matrices on the CPU",
            f'pip install "onnxruntime>={OLDEST[0]}.{OLDEST[1]}"',
        )
    return ort


def has_dot_products() -> bool:
    """Whether this processor adds up 8-bit products at full speed; without, quantised graphs work, more slowly."""
    return bool(DOT_PRODUCTS & cpu_flags())


class BoundSession:
    """One graph, its inputs and outputs bound to tensors."""

    def __init__(self, graph: bytes | str, threads: int) -> None:
        ort = load_onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        self.session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.binding = self.session.io_binding()
        self._kept: dict[str, Any] = {}
        self._outputs = {output.name for output in self.session.get_outputs()}

    def bind(self, name: str, tensor: Tensor) -> None:
        """Read the input, or write the output, of that name at the tensor's own memory (contiguous, on the CPU)."""
        import numpy

        bind = self.binding.bind_output if name in self._outputs else self.binding.bind_input
        bind(name, "cpu", 0, getattr(numpy, NUMPY[tensor.dtype]), tuple(tensor.shape), tensor.data_ptr())
        self._kept[name] = tensor

    def run(self) -> None:
        self.session.run_with_iobinding(self.binding)
