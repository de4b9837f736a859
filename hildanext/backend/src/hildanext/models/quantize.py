"""QLoRA's base: frozen linear layers kept in 4 bits (NF4 with double quantisation), everything else left alone.

bitsandbytes packs and unpacks; the product is ours. Its own layer changes the packing in place when it is run in
evaluation mode on some CPUs, so that the same weights would give other numbers after a validation.

Paper: QLoRA, arXiv:2305.14314.
Differs: the compute dtype is that of the activations (autocast's, where it is on), which the loop chooses by device.
"""

import contextlib
import io
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from hildanext.core.errors import ConfigError

Quantize = Literal["nf4"]

BLOCK = 64
"""Weights that share a scale."""
SCALES = 256
"""Scales that share a scale of their own."""
INSTALL = "install the extra: pip install -e 'hildanext/backend[quant]'"
OLDEST_CUDA = (6, 0)


def bitsandbytes_on(device: torch.device) -> Any:
    """The package, once it is known to work on `device`.

    Raises `ConfigError` where it is missing, where it does not support a device of that kind, and where its kernels
    for this device are not there or compute something else.
    """
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"bitsandbytes does not support the device {str(device)!r}",
            "use cpu or cuda, or leave out quantize and optimizer=adamw8bit",
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_CUDA:
        major, minor = torch.cuda.get_device_capability(device)
        raise ConfigError(
            f"bitsandbytes needs compute capability 6.0, {device} has {major}.{minor}", "use LoRA without quantize"
        )
    bitsandbytes = _imported()
    try:
        packed, state = bitsandbytes.functional.quantize_4bit(
            torch.ones(BLOCK, BLOCK, device=device), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        back = bitsandbytes.functional.dequantize_4bit(packed, state)
    except (RuntimeError, NotImplementedError, AttributeError, TypeError) as problem:
        raise ConfigError(
            f"bitsandbytes {bitsandbytes.__version__} has no kernels for {device} ({problem})", "see hildanext doctor"
        ) from None
    if not bool((back - 1.0).abs().max() < 1e-2):
        raise ConfigError(
            f"bitsandbytes {bitsandbytes.__version__} computes wrong numbers on {device}",
            "install another version of it",
        )
    return bitsandbytes


def _imported() -> Any:
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # 0.50 logs advice about a package we do not use
            import bitsandbytes
            import bitsandbytes.functional
            import bitsandbytes.optim
    except ModuleNotFoundError:
        raise ConfigError("bitsandbytes is not installed", INSTALL) from None
    except (ImportError, OSError, RuntimeError, AttributeError) as problem:
        raise ConfigError(f"bitsandbytes cannot be imported ({problem})", INSTALL) from None
    return bitsandbytes


def check_quantize(quantize: Quantize | None, has_lora: bool) -> None:
    """Raise `ConfigError` where 4-bit weights would have to be trained themselves."""
    if quantize is not None and not has_lora:
        raise ConfigError(
            f"quantize = {quantize!r} without lora", 'give adapters to train, for instance "lora": {"rank": 16}'
        )


def place(
    causal_lm: PreTrainedModel, dtype: torch.dtype, device: torch.device | str, quantize: Quantize | None
) -> PreTrainedModel:
    """Put a loaded model on its device in `dtype`, its linear layers in 4 bits where asked. In place.

    Embeddings, head and norms stay numbers. Layers travel one by one, so that a model whose plain weights do not fit
    the device can still be put there. Raises `ConfigError` (see `bitsandbytes_on`).
    """
    device = torch.device(device)
    if quantize is not None:
        bitsandbytes_on(device)
        body = causal_lm.model
        for name, layer in [(n, m) for n, m in body.named_modules() if type(m) is nn.Linear]:
            above, _, leaf = name.rpartition(".")
            setattr(body.get_submodule(above), leaf, Nf4Linear.of(layer, device))
    return causal_lm.to(device=device, dtype=dtype)


class _FrozenProduct(torch.autograd.Function):
    """x W^T for a packed W. Nothing but the packed weight is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "Nf4Linear") -> Tensor:
        ctx.layer = layer
        return x @ layer.unpacked(x.dtype).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ ctx.layer.unpacked(gradient.dtype), None


class Nf4Linear(nn.Linear):
    """A frozen linear layer in 4 bits and 0.127 bits of scales per weight.

    `weight` holds the packed nibbles, uint8 of shape [out * in / 2, 1]; the scales are buffers beside it, so that
    the layer moves and is counted like any other. An adapter sees an ordinary linear layer.
    """

    scales: Tensor
    scale_of_scales: Tensor
    scale_code: Tensor
    scale_offset: Tensor
    code: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Nf4Linear":
        """Move with the module, but keep the scales' own type."""
        return super()._apply(lambda x: x.to(fn(x).device) if x.is_floating_point() else fn(x), recurse)

    @classmethod
    @torch.no_grad()
    def of(cls, layer: nn.Linear, device: torch.device) -> "Nf4Linear":
        """Quantise a layer onto `device`; the layer itself is left as it is. Raises `ConfigError` for odd shapes."""
        if layer.weight.numel() % BLOCK:
            raise ConfigError(
                f"a linear layer of {layer.in_features} x {layer.out_features} does not split into blocks of {BLOCK}",
                "leave out quantize",
            )
        plain = layer.weight.detach().to(device).float().contiguous()
        packed, state = _imported().functional.quantize_4bit(
            plain, blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        fresh = cls(layer.in_features, layer.out_features, bias=False, device="meta")
        fresh.weight = nn.Parameter(packed, requires_grad=False)
        if layer.bias is not None:
            fresh.bias = nn.Parameter(layer.bias.detach().to(device), requires_grad=False)
        for name, value in (
            ("scales", state.absmax),
            ("scale_of_scales", state.state2.absmax),
            ("scale_code", state.state2.code),
            ("scale_offset", state.offset),
            ("code", state.code),
        ):
            fresh.register_buffer(name, value, persistent=False)
        return fresh

    @torch.no_grad()
    def unpacked(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The weight as numbers; fp64 holds those of fp32."""
        functional = _imported().functional
        narrow = dtype if dtype in (torch.float16, torch.bfloat16, torch.float32) else torch.float32
        nested = functional.QuantState(
            absmax=self.scale_of_scales, code=self.scale_code, blocksize=SCALES, dtype=torch.float32
        )
        # Rows of one block: the CPU kernel of 0.50.2 gives wrong numbers where a block crosses the end of a row.
        state = functional.QuantState(
            absmax=self.scales, shape=torch.Size((self.scales.numel(), BLOCK)), code=self.code,
            blocksize=BLOCK, quant_type="nf4", dtype=narrow, offset=self.scale_offset, state2=nested,
        )  # fmt: skip
        weight: Tensor = functional.dequantize_4bit(self.weight, state)
        return weight.view(self.out_features, self.in_features).to(dtype)

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        out: Tensor = _FrozenProduct.apply(x, self)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, nf4"
