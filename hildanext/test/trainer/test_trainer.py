"""Parts of the training loop by themselves: the guard, the saved state, what processes share, and Accelerate."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hildanext.core.errors import ConfigError, TrainingStopped
from hildanext.core.runtime import accelerates_bf16
from hildanext.trainer.guard import Guard, GuardConfig
from hildanext.trainer.processes import any_process, on_main, open_accelerator
from hildanext.trainer.state import STATE, gather_state, load_state, save_state


def guard_after(losses: list[float], block_size: int = 4, **knobs: Any) -> Guard:
    guard = Guard(GuardConfig(**knobs))
    for step, loss in enumerate(losses):
        guard.check(step, block_size, loss, 1.0)
    return guard


def test_spikes_do_not_become_the_usual_loss():
    """Six spikes among ten losses would raise the median above a quarter of a spike, and the count would restart."""
    guard = guard_after([1.0] * 5, spike_factor=4.0, patience=10, window=10)
    with pytest.raises(TrainingStopped, match="for 10 steps"):
        for step in range(10):
            guard.check(step, 4, 9.0, 1.0)


def test_a_guard_restored_at_a_rungs_end_forgets_the_smaller_blocks_losses():
    old = guard_after([1.0] * 10, block_size=4)
    fresh = Guard(GuardConfig(patience=1))
    fresh.restore(json.loads(json.dumps(old.state())))
    fresh.check(10, 32, 9.0, 1.0)  # nine times the usual loss at block size 4, of which nothing is known at 32
    assert fresh.calm


def test_a_guard_restored_within_a_rung_remembers_it():
    fresh = Guard(GuardConfig(patience=1))
    fresh.restore(json.loads(json.dumps(guard_after([1.0] * 10).state())))
    with pytest.raises(TrainingStopped, match="median"):
        fresh.check(10, 4, 9.0, 1.0)


def test_a_guard_reads_a_state_that_tells_no_block_size():
    fresh = Guard(GuardConfig(patience=1))
    fresh.restore({"losses": [1.0] * 10, "spikes": 0})
    fresh.check(10, 4, 9.0, 1.0)
    assert fresh.calm


def two_steps(fused: bool, dtype: torch.dtype = torch.float64) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = nn.Linear(3, 2).to(dtype)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=fused)
    for _ in range(2):
        module(torch.ones(1, 3, dtype=dtype)).sum().backward()
        optimizer.step()
    return module, optimizer


@pytest.mark.parametrize("fused", [True, False])
def test_every_slot_goes_where_the_optimizer_wants_it(tmp_path: Path, fused: bool):
    """torch's own rule: a fused (or capturable) optimizer keeps `step` as fp32 beside the parameter, a plain one as
    it was; the other slots have the parameter's dtype and device. On a GPU the same rule decides the device."""
    module, optimizer = two_steps(fused)
    save_state(tmp_path, gather_state(module, optimizer), {"step": 2})
    file = tmp_path / STATE / "optimizer.safetensors"
    slots = load_file(file)
    save_file({k: v.double() if k.startswith("step") else v.float() for k, v in slots.items()}, file)
    fresh, again = two_steps(fused)
    again.state.clear()
    assert load_state(tmp_path, fresh, again) == {"step": 2}
    for parameter in fresh.parameters():
        state = again.state[parameter]
        assert state["step"].dtype == (torch.float32 if fused else torch.float64) and float(state["step"]) == 2
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == parameter.dtype
        assert {value.device for value in state.values()} == {parameter.device}


def test_a_restored_optimizer_goes_on_as_the_one_that_was_saved(tmp_path: Path):
    module, optimizer = two_steps(True)
    save_state(tmp_path, gather_state(module, optimizer), {"step": 2})
    fresh, again = two_steps(True)
    load_state(tmp_path, fresh, again)
    again.param_groups[0]["lr"] = 0.1
    for one, other in ((module, optimizer), (fresh, again)):
        other.zero_grad()
        one(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
        other.step()
    assert torch.equal(module.weight, fresh.weight)


def test_a_second_run_in_a_process_may_have_another_precision(tmp_path: Path):
    for precision in ("no", "bf16", "no"):
        assert open_accelerator(precision, "cpu").mixed_precision == precision


def test_the_accelerator_says_where_to_compute():
    accelerator = open_accelerator("auto", "cpu")
    assert accelerator.device == torch.device("cpu")
    assert accelerator.mixed_precision == ("bf16" if accelerates_bf16(accelerator.device) else "no")


def test_processes_do_not_send_each_other_buffers_at_every_step():
    """They never change, and the parent's head, one of them, is the largest matrix of all."""
    assert open_accelerator("no", "cpu").ddp_handler.broadcast_buffers is False


def test_an_accelerator_that_computes_elsewhere_is_refused(monkeypatch):
    monkeypatch.setattr("hildanext.trainer.processes.choose_device", lambda name: torch.device("meta"))
    with pytest.raises(ConfigError, match="computes on cpu, not on 'meta'"):
        open_accelerator("no", "meta")


def test_alone_the_main_process_just_acts():
    accelerator = open_accelerator("no", "cpu")
    assert on_main(accelerator, lambda: 3) == 3
    assert any_process(accelerator, True) and not any_process(accelerator, False)
