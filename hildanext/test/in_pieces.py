"""Several processes, started by a test: each conversion of `plan.json`, one after another, under the launcher's choice.

Each process writes `rank-<n>.json`: what share of the parameters and of the optimiser's states it held.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState

import hildanext.training
from hildanext.core.runtime import is_main_process
from hildanext.wsd_stage0 import convert


def share(tensors: list[torch.Tensor]) -> float:
    """How much of the tensors' numbers lies here."""
    here = sum(tensor.to_local().numel() if hasattr(tensor, "to_local") else tensor.numel() for tensor in tensors)
    return here / sum(tensor.numel() for tensor in tensors)


def main(folder: Path) -> None:
    shares: list[dict[str, Any]] = []
    loops: list[Any] = []
    run_to_end = hildanext.training._Loop.run_to_end

    def noted(loop: Any, quiet: bool) -> None:
        run_to_end(loop, quiet)
        loops.append(loop)

    hildanext.training._Loop.run_to_end = noted  # type: ignore[method-assign]
    for conversion, data, run in json.loads((folder / "plan.json").read_text()):
        convert(conversion, data, run, quiet=True)
        loop = loops.pop()
        slots = [slot for slots in loop.bare_optimizer.state.values() for slot in slots.values() if slot.ndim]
        shares.append({"parameters": share(list(loop.unwrapped.parameters())), "states": share(slots)})
    rank = PartialState().process_index
    assert is_main_process() == (rank == 0)
    (folder / f"rank-{rank}.json").write_text(json.dumps(shares))
    PartialState().destroy_process_group()


main(Path(sys.argv[1]))
