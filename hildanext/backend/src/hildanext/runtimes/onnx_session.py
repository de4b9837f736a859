"""Graphs in ONNX Runtime: sessions on so many threads, and tensors bound to them without a copy.

onnxruntime is imported when the first session is made.
"""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hildanext.core.errors import CheckpointError, ConfigError
from hildanext.models.card import CARD

OLDEST = (1, 22)
"""The first version whose CPU kernels multiply block-wise 8-bit matrices."""
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


class BoundSession:
    """One graph, its inputs and outputs bound to tensors."""

    def __init__(self, graph: Path, threads: int) -> None:
        """Raises `CheckpointError` for a graph that is not ours or broken, `ConfigError` as `load_onnxruntime`."""
        ort = load_onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Every session has threads of its own. Those of one that has ended must not spin in the way of the next one's:
        # on two cores a forward and its head took 29 ms with spinning and 11 without (SmolLM2-135M, q8; one look).
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if not graph.is_file():
            raise CheckpointError(f"{graph} is not there", "export the model again")
        errors = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
        try:
            self.session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        except (errors.Fail, errors.InvalidProtobuf, errors.InvalidGraph, errors.NotImplemented, errors.InvalidArgument,
                errors.NoSuchFile, errors.RuntimeException) as problem:  # fmt: skip
            raise CheckpointError(
                f"{graph} cannot be run ({str(problem).splitlines()[0]})", "export it again"
            ) from None
        if CARD not in self.session.get_modelmeta().custom_metadata_map:
            raise CheckpointError(f"{graph} is no graph of this package", "export the model with `hildanext export`")
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
