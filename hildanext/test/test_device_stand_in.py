"""The device that is not there: it minds CUDA's rules, tells where the host waits, and has the CPU's numbers."""

import threading

import pytest
import torch
from torch import nn

from device_stand_in import DEVICE, StandInDevice, StandInTensor, back, place
from hildanext.core.runtime import send


@pytest.fixture
def device():
    with StandInDevice().open() as there:
        yield there


def there(*shape: int) -> torch.Tensor:
    return place_tensor(torch.arange(float(torch.Size(shape).numel())).view(shape))


def place_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return StandInTensor(tensor.clone())


HOST = torch.ones(4)
MIXES = {
    "sum": lambda x: x + HOST,
    "product": lambda x: x @ HOST,
    "cat": lambda x: torch.cat([x, torch.ones(1, 4)]),
    "where": lambda x: torch.where(x > 0, x, torch.ones(3, 4)),
    "in place": lambda x: x.add_(HOST),
    "into the host's": lambda x: torch.ones(3, 4).add_(x),
    "a number of the host's": lambda x: torch.tensor(1.0).add_(x.sum()),
    "values": lambda x: x.index_put_((torch.zeros(4, dtype=torch.long, device=DEVICE),), torch.ones(4, 4)),
    "the device's index": lambda x: HOST[x[0].long()],
    "gather": lambda x: x.gather(1, torch.zeros(3, 1, dtype=torch.long)),
    "isin": lambda x: torch.isin(x, HOST),
    "layer": lambda x: nn.Linear(4, 2)(x),
    "generator": lambda x: torch.rand(3, device=DEVICE, generator=torch.Generator()),
}


@pytest.mark.parametrize("mix", MIXES)
def test_what_mixes_devices_raises(mix: str, device: StandInDevice):
    with pytest.raises(RuntimeError, match="same device|device type for generator"):
        MIXES[mix](there(3, 4))


def test_numbers_and_copies_may_cross(device: StandInDevice):
    x = there(3, 4)
    assert (x + torch.tensor(1.0)).device == DEVICE and (torch.tensor(2.0) * x).device == DEVICE
    assert not device.waits and not device.copies
    x.copy_(torch.ones(3, 4))
    x[0] = torch.zeros(4, device=DEVICE)
    host = torch.empty(3, 4).copy_(x)
    assert host.tolist() == [[0.0] * 4, [1.0] * 4, [1.0] * 4]
    assert [copy.kind for copy in device.copies] == ["copy"] and device.kinds() == {"cpu": 1}


WAITS = {
    "item": (lambda x: x[0, 0].item(), {"item": 1}),
    "bool": (lambda x: bool(x.any()), {"bool": 1}),
    "int": (lambda x: int(x.sum()), {"int": 1}),
    "float": (lambda x: float(x.sum()), {"float": 1}),
    "if": (lambda x: 1 if x[0, 0] else 0, {"bool": 1}),
    "index": (lambda x: [0, 1, 2][x[0, 1].long()], {"index": 1}),
    "tolist": (lambda x: x.tolist(), {"tolist": 1}),
    "cpu": (lambda x: x.cpu(), {"cpu": 1}),
    "to": (lambda x: x.to("cpu"), {"cpu": 1}),
    "to as": (lambda x: x.to(torch.zeros(1)), {"cpu": 1}),
    "nonzero": (lambda x: x.nonzero(), {"nonzero": 1}),
    "where": (lambda x: torch.where(x > 0), {"nonzero": 1}),
    "mask": (lambda x: x[x > 0], {"mask indexing": 1}),
    "masked_select": (lambda x: x.masked_select(x > 0), {"masked_select": 1}),
    "two masks": (lambda x: x[x[:, 0] >= 0, x[0] > 0], {"mask indexing": 2}),
    "values at a mask": (lambda x: x.__setitem__(x > 5, x[0, :1].expand(6)), {"mask indexing": 1}),
    "unique": (lambda x: x.unique(), {"unique": 1}),
    "bincount": (lambda x: x.flatten().long().bincount(), {"bincount": 2}),
    "repeats": (lambda x: x[0].repeat_interleave(x[0].long()), {"repeat_interleave": 1}),
    "equal": (lambda x: torch.equal(x, x), {"equal": 1}),
    "allclose": (lambda x: torch.allclose(x, x + 1), {"allclose": 1}),
    "slice": (lambda x: x[: x[0, 2].long()], {"item": 1}),
    # and what does not wait
    "arithmetic": (lambda x: (x @ x.T).softmax(-1).argsort(stable=True), {}),
    "masked_fill": (lambda x: x.masked_fill(x > 0, 1.0), {}),
    "a number at a mask": (lambda x: x.__setitem__(x > 0, 1.0), {}),
    "masked_scatter": (lambda x: x.masked_scatter(x > 0, x), {}),
    "gathered": (lambda x: x[x[:, 0].long().clamp_max(2)], {}),
    "repeats of a known sum": (lambda x: x[0].repeat_interleave(x[0].long(), output_size=6), {}),
    "isin": (lambda x: torch.isin(x, x[0, :2]), {}),
    "likeness": (lambda x: (torch.zeros_like(x), x.new_zeros(3), torch.arange(3, device=x.device)), {}),
}


@pytest.mark.parametrize("case", WAITS)
def test_every_point_where_the_host_waits_is_told(case: str, device: StandInDevice):
    do, kinds = WAITS[case]
    do(there(3, 4))
    assert device.kinds() == kinds, device.listed()


@pytest.mark.parametrize("waits", [False, True])
def test_what_is_sent_is_told(waits: bool, device: StandInDevice):
    values = torch.tensor([1, 2], device=DEVICE) if waits else send([1, 2], DEVICE)
    assert values.device == DEVICE and back(values).tolist() == [1, 2]
    assert [copy.kind for copy in device.copies] == ["copy" if waits else "copy, not waited"]
    assert there(3, 4)[torch.tensor([0, 1])].shape == (2, 4)
    assert len(device.copies) == 2, "an index from the host is copied over"


def test_a_wait_names_the_line_of_the_package(device: StandInDevice):
    send([1], DEVICE)
    assert [wait.place.partition(":")[0] for wait in device.copies] == ["core/runtime.py"]
    assert "runtime.py" in device.listed() and "non_blocking" in device.listed()
    float(there(4).sum())
    assert device.waits[0].place.startswith("test_device_stand_in.py:") and "float(" in device.listed()


def test_numpy_and_a_thread_s_tensors(device: StandInDevice):
    with pytest.raises(TypeError, match="cpu"):
        there(2).numpy()
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.arange(3, device=DEVICE).tolist()))
    thread.start()
    thread.join()
    assert seen == [[0, 1, 2]] and device.kinds() == {"tolist": 1}


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * grad * torch.ones_like(x)


def network(on: torch.device, where) -> list[torch.Tensor]:
    """A forward and a backward through most of what models do."""
    torch.manual_seed(0)
    net = where(nn.Sequential(nn.Embedding(7, 8), nn.LayerNorm(8), nn.Linear(8, 8)))
    tokens = torch.tensor([[1, 2, 3, 1]]).to(on, non_blocking=True)
    x = net(tokens)
    heads = x.view(1, 4, 2, 4).transpose(1, 2)
    mask = torch.ones(4, 4, dtype=torch.bool, device=on).tril()
    mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)
    mixed = torch.utils.checkpoint.checkpoint(lambda y: Twice.apply(y).tanh(), mixed, use_reentrant=False)
    kept = x.detach().clone()
    kept[:, 1:].mul_(2)
    kept[0, 0] = 5.0
    loss = nn.functional.cross_entropy(mixed.flatten(2).flatten(0, 1), tokens[0, :2].repeat(1) % 4) + kept.std()
    loss.backward()
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    optimizer.step()
    with torch.inference_mode():
        after = net(tokens)
        after[0, 0] += kept[0, 0]
    return [loss, mixed, kept, after, *net.parameters(), *(parameter.grad for parameter in net.parameters())]


def test_the_numbers_are_the_cpu_s_to_the_bit(device: StandInDevice):
    plain = network(torch.device("cpu"), lambda net: net)
    shown = network(DEVICE, place)
    assert all(number.device == DEVICE for number in shown)
    assert all(torch.equal(back(one), back(other)) for one, other in zip(plain, shown, strict=True))
    assert not device.waits, device.listed()


def test_autocast_computes_products_in_the_narrow_dtype(device: StandInDevice):
    layer, x = place(nn.Linear(4, 2)), there(3, 4)
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x)
        assert y.dtype is torch.bfloat16 and (x @ x.T).dtype is torch.bfloat16
        assert y.softmax(-1).dtype is torch.float32
        with torch.autocast("cuda", enabled=False):
            assert layer(x).dtype is torch.float32
    y.float().sum().backward()
    assert layer.weight.grad.dtype is torch.float32


def test_what_is_tied_stays_tied():
    net = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    net[1].weight = net[0].weight
    place(net)
    assert net[0].weight is net[1].weight and net[0].weight.device == DEVICE and net[0].weight.requires_grad
