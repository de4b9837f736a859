"""The switches that save memory: same numbers, same resume, and refusals where a device cannot honour them."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import random_model
from hildanext.core import runtime
from hildanext.core.errors import ConfigError
from hildanext.core.metrics_log import read_metrics
from hildanext.core.runtime import make_generator
from hildanext.losses import SupervisedStep
from hildanext.losses.autoregressive import Autoregressive
from hildanext.losses.mask_to_token import MaskToToken
from hildanext.models.lora import LoraConfig, add_lora
from hildanext.models.quantize import place
from hildanext.trainer import optimizer as optimizers
from hildanext.trainer.config import TrainConfig, ready_device
from hildanext.trainer.optimizer import OffloadedStates, build_optimizer, check_device
from hildanext.training import make_optimizer
from hildanext.wsd_stage0 import check, convert
from noised_examples import make_view
from training_fixtures import change, small_conversion
from training_fixtures import losses as losses_of


@pytest.fixture
def sections(tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return small_conversion(tmp_path)


CPU = torch.device("cpu")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (the extra 'quant')"
)


def gradients(model, recompute: bool, autocast: bool = False) -> dict[str, torch.Tensor]:
    """Of one step with a masked and a clean reading, under noise on the mask's embedding."""
    if recompute:
        model.recompute_layers()
    losses = {"m2t": MaskToToken()} | ({"ar": Autoregressive()} if model.card.alignment == "parent" else {})
    step = SupervisedStep(model, losses).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=not recompute):
        outcome = step(make_view(length=16, batch=2), 0.1, make_generator(7))
    outcome.total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("alignment", ["block", "parent"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_recomputed_layers_give_identical_gradients_in_fp64(family: str, alignment: str):
    kept = gradients(random_model(family, alignment), recompute=False)
    again = gradients(random_model(family, alignment), recompute=True)
    assert kept.keys() == again.keys() and len(kept) > 20
    assert all(torch.equal(kept[name], again[name]) for name in kept)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputed_adapters_draw_the_same_dropout(dropout: float):
    per_pass = []
    for recompute in (False, True):
        model = random_model()
        torch.manual_seed(0)
        add_lora(model, LoraConfig(rank=2, dropout=dropout))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        per_pass.append(gradients(model, recompute))
    assert all(torch.equal(per_pass[0][name], per_pass[1][name]) for name in per_pass[0])


@needs_bitsandbytes
def test_recomputed_4_bit_layers_give_identical_gradients():
    per_pass = []
    for recompute in (False, True):
        model = random_model(dtype=torch.float32)
        place(model.causal_lm, torch.float64, CPU, "nf4")
        torch.manual_seed(0)
        add_lora(model, LoraConfig(rank=2))
        per_pass.append(gradients(model, recompute))
    assert all(torch.equal(per_pass[0][name], per_pass[1][name]) for name in per_pass[0])


def kept_bytes(model, recompute: bool) -> int:
    """What autograd keeps of a forward under autocast, by storage, the parameters left out."""
    if recompute:
        model.recompute_layers()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            alive.append(tensor)
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    step = SupervisedStep(model, {"m2t": MaskToToken()}).train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(make_view(length=64, batch=4))
    return sum(sizes.values())


def test_recomputing_keeps_a_fraction():
    kept = kept_bytes(random_model(layers=4), recompute=False)
    assert kept_bytes(random_model(layers=4), recompute=True) < 0.2 * kept


def test_a_run_with_recomputed_layers_has_the_same_losses(sections, tmp_path: Path):  # noqa: F811
    conversion, data = sections
    convert(conversion, data, tmp_path / "plain", quiet=True)
    convert(change(conversion, gradient_checkpointing=True), data, tmp_path / "again", quiet=True)
    assert losses_of(tmp_path / "again") == losses_of(tmp_path / "plain")


def test_a_run_may_be_resumed_with_recomputed_layers(sections, tmp_path: Path):  # noqa: F811
    conversion, data = sections
    convert(change(conversion, stop_after=2), data, tmp_path / "run", quiet=True)
    convert(change(conversion, gradient_checkpointing=True), data, tmp_path / "run", quiet=True)
    assert len(losses_of(tmp_path / "run")) > 2


QLORA = {"lora": {"rank": 4, "alpha": 8}, "quantize": "nf4"}


@needs_bitsandbytes
@pytest.mark.parametrize("changes", [{}, QLORA])
def test_8_bit_states_resume_exactly(sections, tmp_path: Path, changes: dict[str, Any], monkeypatch):  # noqa: F811
    monkeypatch.setattr(optimizers, "SMALLEST_8BIT", 64)  # or this model's would all be fp32
    conversion, data = sections
    conversion = change({**conversion, **changes}, optimizer="adamw8bit")
    convert(conversion, data, tmp_path / "whole", quiet=True)
    convert(change(conversion, stop_after=3), data, tmp_path / "cut", quiet=True)
    convert(conversion, data, tmp_path / "cut", quiet=True)
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")
    for file in ("weights", "optimizer"):
        pair = [(tmp_path / run / "state" / f"{file}.safetensors").read_bytes() for run in ("whole", "cut")]
        assert pair[0] == pair[1]


@needs_bitsandbytes
def test_8_bit_states_take_a_quarter_and_train_like_the_others():
    torch.manual_seed(0)
    target, results = torch.randn(64, 64), {}
    for name in ("adamw", "adamw8bit"):
        weight = nn.Parameter(torch.zeros(64, 64))
        optimizer = build_optimizer(name, {"weight": weight}, 0.05, (0.9, 0.95), 0.0)
        for _ in range(60):
            optimizer.zero_grad()
            ((weight - target) ** 2).sum().backward()
            optimizer.step()
        states = optimizer.state[weight].values()
        large = [value for value in states if isinstance(value, torch.Tensor) and value.numel() >= weight.numel()]
        results[name] = (sum(value.nbytes for value in large), float((weight.detach() - target).abs().mean()))
    assert results["adamw"][0] == 8 * 64 * 64 and results["adamw8bit"][0] == 2 * 64 * 64
    assert results["adamw8bit"][1] < 0.1 and results["adamw"][1] < 0.1


def test_matrices_decay_and_the_rest_does_not():
    optimizer = make_optimizer(random_model(dtype=torch.float32), TrainConfig(weight_decay=0.3))
    decays = {group["weight_decay"]: group["params"] for group in optimizer.param_groups}
    assert set(decays) == {0.3, 0.0}
    assert all(p.ndim == 2 for p in decays[0.3]) and len(decays[0.3]) == 3 * 7


class Pinned:
    """Counts what a GPU would be asked for, on a machine without one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pins, self.waits = 0, 0
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: self.pin(tensor))
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self.pins += 1
        return tensor

    def wait(self, device: torch.device) -> None:
        self.waits += 1


def test_resting_states_change_no_number_and_are_pinned_once(monkeypatch: pytest.MonkeyPatch):
    pinned, trained = Pinned(monkeypatch), []
    for rests in (False, True):
        torch.manual_seed(0)
        weight, small = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(8))
        optimizer = torch.optim.AdamW([weight, small], lr=0.1)
        resting = OffloadedStates(optimizer, CPU)
        for _ in range(3):
            (weight.sum() * small.sum()).backward()
            if rests:
                with resting.onload():
                    working = optimizer.state[weight]["exp_avg"] if optimizer.state[weight] else None
                    optimizer.step()
                assert working is None or optimizer.state[weight]["exp_avg"] is resting.beds[id(weight), "exp_avg"]
            else:
                optimizer.step()
        trained.append((weight.detach().clone(), small.detach().clone()))
    assert torch.equal(trained[0][0], trained[1][0]) and torch.equal(trained[0][1], trained[1][1])
    assert pinned.pins == 2 and pinned.waits == 3  # two moments of the one large parameter, three steps


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_states_cannot_rest_where_there_is_no_gpu(device: str):
    with pytest.raises(ConfigError, match=f"offload = 'optimizer' moves states off a GPU, and this run is on {device}"):
        check_device("adamw", "optimizer", torch.device(device))


def test_a_conversion_refuses_a_switch_before_it_loads_a_model(sections, tmp_path: Path):  # noqa: F811
    conversion, data = sections
    conversion = {**conversion, "parent": str(tmp_path / "there is no model here")}
    for switch, value in (("offload", "optimizer"), ("max_vram_fraction", 0.85)):
        with pytest.raises(ConfigError, match="this run is on cpu"):
            convert(change({**conversion, "device": "cpu"}, **{switch: value}), data, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_4_bits_without_adapters_are_refused_by_check(sections):  # noqa: F811
    conversion, data = sections
    with pytest.raises(ConfigError, match="without lora"):
        check({**conversion, "quantize": "nf4"}, data)
    with pytest.raises(ConfigError, match="quantize"):
        check({**conversion, "quantize": "int3"}, data)


def test_the_cap_reaches_the_allocator(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: asked.append((share, device))
    )
    ready_device(TrainConfig(max_vram_fraction=0.85), torch.device("cuda:1"))
    ready_device(TrainConfig(max_vram_fraction=0.5), torch.device("cuda"))
    ready_device(TrainConfig(), torch.device("cuda:0"))
    assert asked == [(0.85, 1), (0.5, None)]


def test_the_cap_comes_before_the_first_allocation(sections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    """The stage asks for the cap, and only then loads the model."""
    import hildanext.wsd_stage0 as stage

    order = []
    loads = stage.start_conversion
    monkeypatch.setattr("hildanext.trainer.config.cap_allocator", lambda device, share: order.append(share))
    monkeypatch.setattr(stage, "start_conversion", lambda *a, **k: order.append("load") or loads(*a, **k))
    conversion, data = sections
    convert(change(conversion, max_vram_fraction=0.7, stop_after=1), data, tmp_path / "run", quiet=True)
    assert order[:2] == [0.7, "load"]


def test_a_cap_without_a_gpu_is_refused():
    with pytest.raises(ConfigError, match="max_vram_fraction = 0.5 caps the memory of a GPU"):
        runtime.cap_allocator(CPU, 0.5)


@needs_bitsandbytes
def test_qlora_with_its_parent_as_teacher_leaves_a_plain_checkpoint(sections, tmp_path: Path):  # noqa: F811
    from hildanext.models.loading.load import load_diffusion

    conversion, data = sections
    teacher = [{"name": "m2t"}, {"name": "kl"}]
    switches = {"optimizer": "adamw8bit", "gradient_checkpointing": True, "learning_rate": {"peak": 1e-2}}
    summary = convert(
        change({**conversion, **QLORA, "losses": teacher}, **switches), data, tmp_path / "run", quiet=True
    )
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train"]
    divergences = [line["losses"]["kl"] for line in lines]
    assert divergences[-1] > 0 and min(divergences) > -1e-6, (
        "nothing but rounding at first: the student is its quantised teacher"
    )
    model, _ = load_diffusion(summary["checkpoint"])
    assert not any("scales" in name or p.dtype == torch.uint8 for name, p in model.named_parameters())
