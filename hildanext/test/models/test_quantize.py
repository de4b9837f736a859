"""QLoRA: 4-bit layers against the rule written out, under adapters, in checkpoints, and where they cannot work."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hildanext.core.errors import ConfigError
from hildanext.models.checkpoint import load_diffusion, plain_state, save_diffusion
from hildanext.models.lora import LoraConfig, add_lora, without_lora
from hildanext.models.quantize import BLOCK, Nf4Linear, bitsandbytes_on, check_quantize, place
from hildanext.models.start import start_conversion
from noised_examples import make_view
from small_models import small_causal, small_parent, small_tokenizer

CPU = torch.device("cpu")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (the extra 'quant')"
)
NF4 = (-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
       0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)  # fmt: skip
"""QLoRA, arXiv:2305.14314, appendix E."""


def nearest_nf4(weight: torch.Tensor) -> torch.Tensor:
    """Each block of 64 in units of its largest magnitude, each value at the nearest of the sixteen."""
    blocks = weight.reshape(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    code = torch.tensor(NF4)
    return (code[((blocks / scale)[..., None] - code).abs().argmin(-1)] * scale).view_as(weight)


@needs_bitsandbytes
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (32, 48), (48, 32), (40, 96), (24, 160), (576, 192)])
def test_unpacked_weights_are_the_nearest_of_nf4(rows: int, columns: int):
    """The scales are themselves in 8 bits, hence the tolerance. 48, 32, 96 and 160 columns are widths at which the
    CPU kernel of bitsandbytes 0.50.2, called by rows of the matrix, returned wrong numbers for nine weights in ten."""
    torch.manual_seed(0)
    layer = nn.Linear(columns, rows)
    unpacked = Nf4Linear.of(layer, CPU).unpacked()
    close = (unpacked - nearest_nf4(layer.weight.detach())).abs() < 0.01 * layer.weight.detach().abs().max()
    assert close.float().mean() > 0.999  # a value half-way between two may be rounded either way
    assert unpacked.shape == (rows, columns)


@needs_bitsandbytes
def test_a_4_bit_layer_takes_half_a_byte_and_a_little_for_each_weight():
    layer = Nf4Linear.of(nn.Linear(1024, 512, bias=False), CPU)
    bytes_ = sum(t.numel() * t.element_size() for t in (layer.weight, layer.scales, layer.scale_of_scales))
    assert bytes_ / (1024 * 512) == pytest.approx(0.5 + 1 / 64 + 4 / 64 / 256)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@needs_bitsandbytes
def test_the_product_and_its_gradient_are_those_of_the_unpacked_weight():
    torch.manual_seed(0)
    layer = Nf4Linear.of(nn.Linear(64, 32), CPU)
    x = torch.randn(3, 5, 64, dtype=torch.float64, requires_grad=True)
    again = x.detach().clone().requires_grad_()
    ours = layer(x)
    theirs = again @ layer.unpacked(torch.float64).T + layer.bias.double()
    upstream = torch.randn_like(ours)
    ours.backward(upstream)
    theirs.backward(upstream)
    assert torch.equal(ours, theirs) and torch.equal(x.grad, again.grad)


@needs_bitsandbytes
def test_training_and_evaluation_give_the_same_numbers_in_either_order():
    layer = Nf4Linear.of(nn.Linear(64, 64, bias=False), CPU)
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    first = layer.train()(x)
    assert torch.equal(layer.eval()(x), first) and torch.equal(layer.train()(x), first)


@needs_bitsandbytes
def test_nothing_but_the_packed_weight_is_kept_for_the_backward_pass():
    layer, kept = Nf4Linear.of(nn.Linear(256, 256, bias=False), CPU), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(torch.randn(8, 256, requires_grad=True))
    assert not kept


@needs_bitsandbytes
def test_the_compute_type_is_that_of_autocast():
    layer = Nf4Linear.of(nn.Linear(64, 64), CPU)
    x = torch.randn(4, 64)
    assert layer(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@needs_bitsandbytes
def test_a_cast_of_the_model_leaves_the_scales_alone():
    layer = Nf4Linear.of(nn.Linear(64, 64), CPU)
    before = layer.unpacked()
    assert torch.equal(layer.to(torch.bfloat16).unpacked(), before)


@needs_bitsandbytes
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_only_the_linear_layers_of_the_body_are_packed(family: str):
    causal_lm = place(small_causal(family), torch.float32, CPU, "nf4")
    packed = {name.split(".")[-1] for name, part in causal_lm.named_modules() if isinstance(part, Nf4Linear)}
    assert packed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not any(type(part) is nn.Linear for part in causal_lm.model.modules())
    assert type(causal_lm.lm_head) is nn.Linear
    floats = [p for n, p in causal_lm.named_parameters() if p.is_floating_point() and "proj" not in n]
    assert floats and all(p.dtype == torch.float32 for p in floats)


def qlora(folder: Path):
    model, tokenizer = start_conversion(small_parent(folder), quantize="nf4", mask_delta=True)
    add_lora(model, LoraConfig(rank=2, alpha=4))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name == "mask_delta":
            nn.init.normal_(parameter, std=0.1)
    return model, tokenizer


def hidden_of(model, tokens: torch.Tensor) -> torch.Tensor:
    from hildanext.models.attention.dense import MaskedAttention

    seq = tokens.shape[1]
    with torch.no_grad():
        mask = torch.ones(1, seq, seq, dtype=torch.bool)
        return model(model.embed(tokens), torch.arange(seq)[None], MaskedAttention(mask))


@needs_bitsandbytes
def test_a_checkpoint_holds_plain_weights_that_compute_the_same(tmp_path: Path):
    model, tokenizer = qlora(tmp_path / "parent")
    save_diffusion(tmp_path / "out", model, tokenizer)
    loaded, _ = load_diffusion(tmp_path / "out")
    tokens = torch.tensor([[5, 9, model.card.mask_id, 7, model.card.mask_id, 11]])
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    assert torch.allclose(hidden_of(model, tokens), hidden_of(loaded, tokens), atol=1e-5)
    half = plain_state(model.causal_lm, torch.float16)
    assert {value.dtype for value in half.values()} == {torch.float16}


@needs_bitsandbytes
def test_without_adapters_the_model_is_its_4_bit_parent(tmp_path: Path):
    model, _ = qlora(tmp_path / "parent")
    parent, _ = start_conversion(tmp_path / "parent", quantize="nf4")
    tokens = torch.tensor([[5, 9, 7, 11]])
    with without_lora(model):
        assert torch.equal(hidden_of(model, tokens), hidden_of(parent, tokens))
    assert not torch.equal(hidden_of(model, tokens), hidden_of(parent, tokens))


@needs_bitsandbytes
def test_a_diffusion_checkpoint_can_carry_adapters_over_4_bits(tmp_path: Path):
    model, tokenizer = qlora(tmp_path / "parent")
    save_diffusion(tmp_path / "out", model, tokenizer)
    again, _ = load_diffusion(tmp_path / "out", quantize="nf4")
    assert any(isinstance(part, Nf4Linear) for part in again.modules())


@needs_bitsandbytes
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_packed_from_the_numbers_on_disk(tmp_path: Path, stored: torch.dtype):
    from hildanext.models.checkpoint import save_causal

    save_causal(tmp_path / "parent", small_causal().to(stored), small_tokenizer())
    model, _ = start_conversion(tmp_path / "parent", quantize="nf4")
    plain, _ = start_conversion(tmp_path / "parent")
    place(plain.causal_lm, torch.float32, CPU, "nf4")
    for ours, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@needs_bitsandbytes
def test_every_adapter_gets_a_gradient_and_no_weight_moves(tmp_path: Path):
    from hildanext.losses import SupervisedStep
    from hildanext.losses.mask_to_token import MaskToToken

    model, _ = qlora(tmp_path / "parent")
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    step = SupervisedStep(model, {"m2t": MaskToToken()})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    step(make_view(length=16)).total.backward()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in trained.values())
    optimizer.step()
    assert all(torch.equal(value, frozen[n]) for n, value in model.named_parameters() if n in frozen)


def test_4_bit_weights_need_adapters():
    with pytest.raises(ConfigError, match="without lora"):
        check_quantize("nf4", has_lora=False)
    check_quantize("nf4", has_lora=True)
    check_quantize(None, has_lora=False)


def test_a_missing_bitsandbytes_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="bitsandbytes is not installed") as caught:
        bitsandbytes_on(CPU)
    assert "quant" in caught.value.hint


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_an_unsupported_device_is_named(device: str):
    with pytest.raises(ConfigError, match=f"does not support the device '{device}'"):
        bitsandbytes_on(torch.device(device))


def test_a_gpu_older_than_pascal_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (5, 2))
    with pytest.raises(ConfigError, match=r"6\.0, cuda:0 has 5\.2"):
        bitsandbytes_on(torch.device("cuda:0"))


@needs_bitsandbytes
def test_kernels_that_compute_something_else_are_refused(monkeypatch: pytest.MonkeyPatch):
    import bitsandbytes.functional

    right = bitsandbytes.functional.dequantize_4bit
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", lambda *a: right(*a) * 1.1)
    with pytest.raises(ConfigError, match="computes wrong numbers"):
        bitsandbytes_on(CPU)


@needs_bitsandbytes
def test_a_layer_that_does_not_split_into_blocks_is_refused():
    with pytest.raises(ConfigError, match="48 x 61"):
        Nf4Linear.of(nn.Linear(48, 61), CPU)


def test_doctor_says_whether_4_bit_layers_work(monkeypatch: pytest.MonkeyPatch):
    from hildanext.commands import doctor

    well = doctor.Finding("ok", "bitsandbytes", "0.50.2")
    monkeypatch.setattr(doctor, "probe_optional", lambda name: well)
    monkeypatch.setattr("hildanext.models.quantize.bitsandbytes_on", lambda device: None)
    assert doctor.examine_bitsandbytes().value.startswith("0.50.2, works on ")
    monkeypatch.setattr("hildanext.models.quantize.bitsandbytes_on", refuse)
    finding = doctor.examine_bitsandbytes()
    assert (finding.state, finding.value, finding.advice) == ("note", "0.50.2; no kernels", "use LoRA")
    absent = doctor.Finding("note", "bitsandbytes", "not installed")
    monkeypatch.setattr(doctor, "probe_optional", lambda name: absent)
    assert doctor.examine_bitsandbytes() is absent


def refuse(device: torch.device) -> None:
    raise ConfigError("no kernels", "use LoRA")
