"""A device that is not there: tensors that say they live on `cuda:0`, compute on the CPU and keep CUDA's rules.

An operation that mixes devices raises as CUDA does; every point where the host would wait for the device, and every
copy to it, is written down with the line that asked for it. The numbers are the CPU's own, to the bit.

A stand-in tensor is a wrapper around a CPU tensor. To C++ it lies on the `meta` device, for which autograd needs no
driver; only Python's `device` tells `cuda:0`. Two modes see to the rest: one reads calls before their arguments are
parsed (a `device` of ours becomes `meta`, `torch.tensor` is built here and sent), one sees what is dispatched.

What is known of CUDA's kernels and not measured here: which of them read back (`READS_BACK`), that a copy from
ordinary memory waits unless it is `non_blocking`, that a mask in an assignment of a number becomes `masked_fill`.
"""

import contextlib
import linecache
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import hildanext

DEVICE = torch.device("cuda:0")
DEVICE_NAMES = ("cuda", "cuda:0")
META = torch.device("meta")
SOURCE = str(Path(hildanext.__file__).parent) + "/"
HERE = __file__
TORCH = str(Path(torch.__file__).parent)
aten = torch.ops.aten

READS_BACK = {
    "_local_scalar_dense": "item",
    "nonzero": "nonzero",
    "masked_select": "masked_select",
    "_unique": "unique",
    "_unique2": "unique",
    "unique_dim": "unique",
    "unique_consecutive": "unique",
    "equal": "equal",
    "allclose": "allclose",
    "multinomial": "multinomial",
}
"""Kernels that end with a number the host must know before it goes on, by the kind they are counted as."""
NUMBERS = ("__bool__", "__int__", "__float__", "__index__", "item")
COPIES = ("_to_copy", "copy_", "_copy_from")


@dataclass(frozen=True)
class Wait:
    """One point where the host waits, or copies to the device."""

    kind: str
    place: str
    """File and line, inside the package where that asked."""
    text: str

    def __str__(self) -> str:
        return f"{self.kind:<20} {self.place:<44} {self.text}"


class StandInTensor(torch.Tensor):
    """Says `cuda:0`; `inner` is the CPU tensor that it stands for."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "StandInTensor":
        # Under inference mode a view of an ordinary tensor is an ordinary one.
        with torch.inference_mode(inner.is_inference()):
            made = torch.Tensor._make_wrapper_subclass(
                cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
                dtype=inner.dtype, device=META,
            )  # fmt: skip
        made.inner = inner
        return made

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_meta = is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        _note_wait("tolist")
        return self.inner.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor first.")

    __array__ = numpy

    def __setitem__(self, place: Any, value: Any) -> None:
        # CUDA takes a number as a CPU scalar; C++ would make it on the device it believes in.
        super().__setitem__(place, value if isinstance(value, Tensor) else torch.tensor(value, dtype=self.dtype))

    def __repr__(self, **_: Any) -> str:
        return f"on {DEVICE}: {self.inner!r}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Local(threading.local):
    device: "StandInDevice | None" = None
    called: str = ""
    """The call that Python made last: the name of a wait's kind where the kernel is the same for many."""


_local = _Local()


def _place() -> tuple[str, str]:
    """The innermost line of the package, else of whoever is neither torch nor this file."""
    frame, outside = sys._getframe(1), None
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(SOURCE):
            return f"{file.removeprefix(SOURCE)}:{frame.f_lineno}", linecache.getline(file, frame.f_lineno).strip()
        if outside is None and file != HERE and not file.startswith(TORCH) and "/python3" not in file:
            outside = frame
        frame = frame.f_back
    if outside is None:
        return "elsewhere", ""
    file, line = outside.f_code.co_filename, outside.f_lineno
    return f"{Path(file).name}:{line}", linecache.getline(file, line).strip()


def _note_wait(kind: str, times: int = 1) -> None:
    if _local.device is not None:
        _local.device.waits += [Wait(kind, *_place())] * times


def _note_copy(waited: bool) -> None:
    if _local.device is not None:
        _local.device.copies.append(Wait("copy" if waited else "copy, not waited", *_place()))


def send(tensor: Tensor, non_blocking: bool = False) -> Tensor:
    """A host tensor's copy on the device, noted."""
    _note_copy(not non_blocking)
    return StandInTensor(tensor.detach().clone())


def _is_ours(device: Any) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == DEVICE.type


def _mixed(func: Any, other: str = "cpu") -> RuntimeError:
    return RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and {other}! "
        f"(in {func})"
    )


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One dispatched operation: check, note, compute on the CPU, wrap what lives on the device."""
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [leaf for leaf in leaves if isinstance(leaf, StandInTensor)]
    asked = kwargs.get("device")
    name = func.overloadpacket.__name__
    if not ours and (asked is None or asked.type != "meta"):
        return func(*args, **kwargs)  # the CPU's own affair
    if any(leaf.is_meta for leaf in leaves):
        raise AssertionError(f"{func} met a tensor without data: the stand-in missed where it was made")
    if name in COPIES:
        return _copy(func, name, args, kwargs)
    if ours:
        args = _indices_sent(name, args)
        _check(func, args, kwargs)
        _note_reads(func, name, args, kwargs)
    generator = kwargs.get("generator")
    if isinstance(generator, torch.Generator) and generator.device.type != DEVICE.type:
        raise RuntimeError(f"Expected a '{DEVICE.type}' device type for generator but found '{generator.device.type}'")
    wrappers = {id(leaf.inner): leaf for leaf in ours}
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    positional, named = tree_map(_inner, (args, kwargs))
    result = func(*positional, **named)
    if asked is not None and asked.type == "cpu":
        return result  # made on the host in the likeness of ours: nothing is read

    def wrapped(out: Any) -> Any:
        if not isinstance(out, Tensor):
            return out
        return wrappers[id(out)] if id(out) in wrappers else StandInTensor(out)

    return tree_map(wrapped, result)


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, StandInTensor) else leaf


def _copy(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """What may cross devices: `to` and `copy_`."""
    if name == "_to_copy":
        source = args[0]
        target = kwargs.get("device") or source.device
        waited = not kwargs.get("non_blocking", False)
        options = {key: value for key, value in kwargs.items() if key not in ("device", "non_blocking")}
        made = func(_inner(source), **options)
        if target.type == "cpu":
            _note_wait("cpu" if waited else "cpu, not waited")
            return made
        if not isinstance(source, StandInTensor):
            _note_copy(waited)
        return StandInTensor(made)
    there, source = args[0], args[1]
    waited = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    if not isinstance(there, StandInTensor):
        _note_wait("cpu" if waited else "cpu, not waited")
    elif not isinstance(source, StandInTensor) and source.dim() > 0:
        _note_copy(waited)
    func(_inner(there), _inner(source))
    return there


def _indices_sent(name: str, args: Any) -> Any:
    """CUDA takes indices from the host and copies them over, waiting."""
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return args
    return (args[0], [_index_sent(args[0], index) for index in args[1]], *args[2:])


def _index_sent(indexed: Tensor, index: Tensor | None) -> Tensor | None:
    if index is None or isinstance(index, StandInTensor) or not isinstance(indexed, StandInTensor):
        return index
    return send(index)


def _check(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Raise where devices mix. CPU tensors of no dimension may be read, never written."""
    for argument, value in _named(func, args, kwargs):
        written = argument.alias_info is not None and argument.alias_info.is_write
        values = list(value) if isinstance(value, list | tuple) else [value]
        for tensor in values:
            if isinstance(tensor, Tensor) and not isinstance(tensor, StandInTensor):
                if written or tensor.dim() > 0 or len(values) > 1:
                    raise _mixed(func)


def _named(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    for place, argument in enumerate(func._schema.arguments):
        if place < len(args):
            yield argument, args[place]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _note_reads(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> None:
    """Write down the waits of one kernel."""
    if name in READS_BACK:
        called = _local.called.strip("_")
        _note_wait(called if name == "_local_scalar_dense" and _local.called in NUMBERS else READS_BACK[name])
    elif name == "bincount":
        _note_wait("bincount", 2)  # the least and the largest value
    elif name == "repeat_interleave":
        if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            _note_wait("repeat_interleave")
    elif name == "isin" and isinstance(args[0], Tensor) and isinstance(args[1], Tensor):
        if args[1].numel() >= 10 * max(args[0].numel(), 1) ** 0.145:
            _note_wait("isin")  # by sorting, which counts the distinct ones
    elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
        fills = name != "index" and len(masks) == sum(index is not None for index in args[1]) == 1
        if not (fills and args[2].numel() == 1 and not isinstance(args[2], StandInTensor)):
            _note_wait("mask indexing", len(masks))


@cache
def _is_composite(func: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_inference_mode_enabled() and _is_composite(func):  # such arrive whole then
            with self:
                return func.decompose(*args, **(kwargs or {}))
        return _run(func, args, kwargs or {})


class _Calls(TorchFunctionMode):
    """Reads calls as Python makes them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        before, _local.called = _local.called, name
        try:
            if func is torch.device:
                return func(*args, **kwargs)
            if func in (torch.tensor, torch.as_tensor, torch.asarray) and _is_ours(kwargs.get("device")):
                return self._sent(func, args, kwargs)
            if name == "new_tensor" and isinstance(args[0], StandInTensor):
                return send(torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)))
            if func is nn.functional.scaled_dot_product_attention:
                return _attention(func, *_cast(func, args, kwargs))
            args = tuple(META if _is_a_device(leaf) else leaf for leaf in args)
            if _is_a_device(kwargs.get("device")):
                kwargs["device"] = META
            args, kwargs = _cast(func, args, kwargs)
            return func(*args, **kwargs)
        finally:
            _local.called = before

    def _sent(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        del kwargs["device"]
        if isinstance(args[0], StandInTensor):
            return args[0]
        grad = kwargs.pop("requires_grad", False)
        return send(func(*args, **kwargs)).requires_grad_(grad)


def _is_a_device(leaf: Any) -> bool:
    return leaf.type == DEVICE.type if isinstance(leaf, torch.device) else type(leaf) is str and leaf in DEVICE_NAMES


def _attention(func: Any, args: Any, kwargs: Any) -> Tensor:
    """The kernel that the CPU would choose; C++ believes in `meta` and would choose the plain one."""
    if not isinstance(args[0], StandInTensor):
        return func(*args, **kwargs)
    inner = tree_map(_inner, (args, kwargs))
    flash = torch._fused_sdp_choice(*inner[0], **inner[1]) == torch.nn.attention.SDPBackend.FLASH_ATTENTION.value
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    if not flash:
        return func(*args, **kwargs)
    mask = arguments.get("attn_mask")
    if mask is not None and mask.dtype is torch.bool:
        zeros = torch.zeros(mask.shape, dtype=args[0].dtype, device=META)
        mask = zeros.masked_fill(~mask, float("-inf"))
    out: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
        arguments["query"], arguments["key"], arguments["value"],
        arguments.get("dropout_p", 0.0), arguments.get("is_causal", False),
        attn_mask=mask, scale=arguments.get("scale"),
    )[0]  # fmt: skip
    return out


NARROW = {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "scaled_dot_product_attention"}
WIDE = {"softmax", "log_softmax", "exp", "log", "pow", "__pow__", "rsqrt", "sum", "cumsum", "norm", "cosine_similarity"}
"""Autocast's lists, as far as models like ours meet them: what is computed in the narrow dtype, what in fp32."""


def _cast(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Autocast's work, which C++ would not do for `meta`."""
    name = getattr(func, "__name__", "")
    if name not in NARROW | WIDE or not torch.is_autocast_enabled(DEVICE.type):
        return args, kwargs
    dtype = torch.get_autocast_dtype(DEVICE.type) if name in NARROW else torch.float32

    def cast(leaf: Any) -> Any:
        floats = isinstance(leaf, StandInTensor) and leaf.is_floating_point() and leaf.dtype != torch.float64
        return leaf.to(dtype) if floats else leaf

    return tree_map(cast, (args, kwargs))


@dataclass
class StandInDevice:
    """Within the context (and in threads that begin in it) `device` is there. Writes down waits and copies."""

    waits: list[Wait] = field(default_factory=list)
    copies: list[Wait] = field(default_factory=list)
    device: torch.device = DEVICE

    def kinds(self) -> dict[str, int]:
        """Waits by kind."""
        return dict(sorted(Counter(wait.kind for wait in self.waits).items()))

    def forget(self) -> None:
        """Begin to count anew."""
        self.waits, self.copies = [], []

    def listed(self) -> str:
        """Every line that waited or copied, most often first, for people."""
        lines = Counter([*self.waits, *self.copies]).most_common()
        return "\n".join(["", *(f"{count:>4} x {wait}" for wait, count in lines)])

    @contextlib.contextmanager
    def in_thread(self) -> Iterator[None]:
        """What makes the device be there in one thread."""
        before, _local.device = _local.device, self
        try:
            with _Calls(), _Dispatch():
                yield
        finally:
            _local.device = before

    @contextlib.contextmanager
    def open(self) -> Iterator["StandInDevice"]:
        run = threading.Thread.run

        def run_here(thread: threading.Thread) -> None:
            with self.in_thread():
                run(thread)

        patches: list[tuple[Any, str, Callable[..., Any]]] = [
            (threading.Thread, "run", run_here),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            # Draws on the device come from the CPU's generator, which whoever forks keeps as well.
            (torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state()),
            (torch.cuda, "set_rng_state", lambda *_: None),
        ]
        with contextlib.ExitStack() as stack:
            for owner, name, replacement in patches:
                stack.enter_context(mock.patch.object(owner, name, replacement))
            stack.enter_context(self.in_thread())
            yield self


def place(module: nn.Module) -> nn.Module:
    """The module on the device, in place; what was tied stays tied (`Module.to` makes new parameters of a new kind)."""
    moved: dict[int, Any] = {}
    for part in module.modules():
        for slots in (part._parameters, part._buffers):
            for name, tensor in slots.items():
                if tensor is None or isinstance(tensor, StandInTensor):
                    continue
                if id(tensor) not in moved:
                    there = StandInTensor(tensor.detach().clone())
                    is_parameter = isinstance(tensor, nn.Parameter)
                    moved[id(tensor)] = nn.Parameter(there, tensor.requires_grad) if is_parameter else there
                slots[name] = moved[id(tensor)]
    return module


def back(tensor: Tensor) -> Tensor:
    """The numbers on the host, unnoted."""
    return tensor.detach().inner if isinstance(tensor, StandInTensor) else tensor.detach()
