"""dInfer's server as we run it: started as its traps demand, asked for whole blocks, ended by force.

Its own `generate` waits without end and its own way to stop does, too: whoever asks does so in a thread that may be
given up, and watches `trouble`.
"""

import importlib
import inspect
import multiprocessing
import threading
from typing import Any

from hildanext.core.errors import ConfigError
from hildanext.engine.base import EngineFailed
from hildanext.engine.dinfer.output import checked
from hildanext.engine.dinfer.probe import model_type

TROUBLES = (ImportError, OSError, RuntimeError, AttributeError, TypeError, AssertionError, ValueError, LookupError)
"""What importing, starting and asking dInfer was seen to raise, and what may be expected of it."""

ALWAYS = {"use_bd": True, "cache": "prefix", "cont_weight": 0.0, "temperature": 0.0, "early_stop": True}
"""Of its parameters for models of blocks: its defaults are for others (with blocks and no cache it crashes)."""

NO_TOKEN = -1
"""Given as its end of text. It takes every end of text out of a row, the prompt's too, and stops at one in the
prompt's last block; where the text ended inside its block could not be told. So it knows none, and we look."""

_there_is_one = threading.Lock()


class DInferServer:
    """One `DiffusionLLMServing`. There can be one in a process, as dInfer's own handle is a singleton."""

    def __init__(self, model: str, sampling: dict[str, Any], serving: dict[str, Any], mask_id: int) -> None:
        """Start it with those parameters of the two classes. Raises `ConfigError`, `EngineFailed`."""
        self._mask_id = mask_id
        if not _there_is_one.acquire(blocking=False):
            raise ConfigError("this process runs dinfer already", "its server is one for a process: start another")
        self._handle: Any = None
        self._children: list[Any] = []
        self._serving: Any = None
        before = set(multiprocessing.active_children())
        try:
            self._serving = self._start(model, {**ALWAYS, **sampling}, serving)
        except TROUBLES as problem:
            raise EngineFailed(f"dinfer does not start ({type(problem).__name__}: {problem})", "see its log") from None
        finally:
            self._children = [child for child in multiprocessing.active_children() if child not in before]
            if self._serving is None:
                self._end_processes()
                _there_is_one.release()

    def _start(self, model: str, sampling: dict[str, Any], serving: dict[str, Any]) -> Any:
        dinfer = importlib.import_module("dinfer")
        handle = importlib.import_module("dinfer.decoding.serving").handle
        if handle.is_running():
            raise ConfigError("somebody else's dinfer runs in this process", "its server is one for a process")
        self._handle = handle  # ours from here on, and ours to end
        known = inspect.signature(dinfer.SamplingParams.__init__).parameters
        wanted = {**sampling, "mask_id": self._mask_id, "eos_id": NO_TOKEN}
        parameters = dinfer.SamplingParams(**{name: value for name, value in wanted.items() if name in known})
        return dinfer.DiffusionLLMServing(model, model_type=model_type(model), sample_params=parameters, **serving)

    @property
    def forwards(self) -> int:
        """Of all calls so far."""
        return int(self._serving.num_forwards)

    def write(self, row: list[int], upto: int, block_size: int) -> list[int]:
        """The row, written on up to a length of whole blocks. Waits without end. Raises `TROUBLES`, `EngineFailed`."""
        import torch

        whole = self._serving.generate(torch.tensor([row]), gen_length=upto - len(row), block_length=block_size)
        return checked(whole[0].tolist(), row, upto, self._mask_id)

    def trouble(self) -> str:
        """Which of its processes has ended; empty while all live."""
        dead = [process for process in self._processes() if not process.is_alive()]
        return f"one of its processes ended with {dead[0].exitcode}" if dead else ""

    def stop(self) -> None:
        """End its processes and forget them. Does nothing the second time."""
        if self._serving is not None:
            self._serving = None
            self._end_processes()
            _there_is_one.release()

    def _processes(self) -> list[Any]:
        groups = self._handle.groups if self._handle is not None else []
        grouped = [process for group in groups for process in group.procs]
        return [*grouped, *(child for child in self._children if child not in grouped)]

    def _end_processes(self) -> None:
        """Also of a start that failed half-way, whose processes no group may know yet."""
        for process in self._processes():
            process.terminate()
            process.join(5.0)
            if process.is_alive():
                process.kill()
        if self._handle is not None:
            self._handle.groups = []
