"""`scripts/same_bits.py`: what counts as a difference between two trees, and what does not."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "same_bits.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("same_bits", SCRIPT)
    module = sys.modules["same_bits"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["same_bits"]


def record(script, values, folder: str = "/a/run"):
    tree = script.Tree(Path("/a"), Path(folder))
    return {"sft": script._as_item(tree, script.Step("sft", (), lambda *_: None), values, 0.0)}


def compare(script, old, new, renamed=None, without=()) -> int:
    return script.compare(old, new, script.Agreed(renamed or {}, frozenset(without)))


def test_times_machines_and_places_are_no_difference(script):
    old = record(script, [{"loss": 1.5, "seconds": 2.0, "tokens_per_second": 9.0, "out": "/a/run/sft", "machine": {}}])
    new = record(script, [{"loss": 1.5, "seconds": 3.0, "out": "/b/sft", "versions": {"torch": "3"}}], folder="/b")
    assert compare(script, old, new) == 0


def test_the_last_bit_of_a_number_is_a_difference_and_is_named(script, capsys):
    old = record(script, [{"losses": {"kl": 0.1}}])
    new = record(script, [{"losses": {"kl": 0.1 + 2**-56}}])
    assert compare(script, old, new) == 1
    assert "[0].losses.kl: 0.1 -> 0.10000000000000002" in capsys.readouterr().out


def test_a_step_that_only_one_record_has_is_a_difference(script):
    old = record(script, [1])
    assert compare(script, old, {}) == compare(script, {}, old) == 1


def test_names_that_changed_and_fields_left_out_can_be_told(script):
    old = record(script, [{"ways": "told", "old": 1}])
    new = record(script, [{"segments": "scripted", "new": 2}])
    assert compare(script, old, new) == 1
    assert compare(script, old, new, {"ways": "segments", "told": "scripted"}, ["old", "new"]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_told_apart_by_name_dtype_shape_and_bits(script, tmp_path, dtype):
    weights = {"b": torch.arange(6.0).to(dtype), "a": torch.ones(2, 3, dtype=dtype)}
    changed = {**weights, "b": weights["b"].clone().index_fill_(0, torch.tensor([5]), 4.0)}
    shapes = {**weights, "b": weights["b"].reshape(2, 3)}
    files = {"first": weights, "again": dict(reversed(weights.items())), "bits": changed, "shape": shapes}
    hashed = {}
    for name, tensors in files.items():
        save_file(tensors, tmp_path / name, metadata={"written": name})
        hashed[name] = script._tensors(tmp_path / name)
    assert hashed["first"] == hashed["again"]
    assert hashed["first"]["a"] == hashed["bits"]["a"] and hashed["first"]["b"] != hashed["bits"]["b"]
    assert hashed["first"]["b"] != hashed["shape"]["b"]
