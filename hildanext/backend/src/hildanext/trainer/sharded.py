"""Training in pieces: every process holds a part of each weight, of its gradient and of its states (FSDP2).

Accelerate's configuration file says whether (`distributed_type: FSDP`); what it starts is torch's `fully_shard`, on
GPUs and on CPUs alike (Accelerate's own call knows no CPU). A state is gathered into the files of an unsharded run, so
that a run may go on under any number of processes, sharded or not.
"""

import contextlib
import copy
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from hildanext.core.errors import ConfigError
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.drafter import Drafter
from hildanext.models.quantize import Nf4Linear
from hildanext.trainer.config import TrainConfig

OLDEST_TORCH = (2, 6)
UNSUPPORTED = {
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "fsdp_cpu_ram_efficient_loading",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing",
}
OTHERS = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}
FILES = "use hildanext/runs/accelerate/fsdp2.json or zero2.json"


def _on(name: str, environment: Mapping[str, str]) -> bool:
    return environment.get(name, "").lower() in ("1", "true", "yes", "on")


def wants_shards(environment: Mapping[str, str] | None = None) -> bool:
    """Whether the launcher asked for FSDP. Raises `ConfigError` for what this loop would do wrongly or not at all."""
    environment = os.environ if environment is None else environment
    for name, engine in OTHERS.items():
        if _on(name, environment):
            raise ConfigError(f"{engine} was asked for, and this loop does not run under it", FILES)
    if not _on("ACCELERATE_USE_FSDP", environment):
        return False
    if environment.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            f"fsdp_version {environment.get('FSDP_VERSION', '1')}", f"only version 2 is supported: {FILES}"
        )
    for name, key in UNSUPPORTED.items():
        if _on(name, environment):
            raise ConfigError(f"{key} is not supported", f"set it to false, or {FILES}")
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if release < OLDEST_TORCH:
        raise ConfigError(
            f"torch {torch.__version__} cannot shard a model this way", "install torch 2.6 or newer, or use ddp.json"
        )
    return True


def check_shardable(module: nn.Module, config: TrainConfig, reads_teacher: bool) -> None:
    """Raise `ConfigError` for what cannot be had in pieces. `reads_teacher`: the stage asks a frozen parent."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = any(isinstance(part, BaseTunerLayer) for part in module.modules())
    refused = {
        "a parent that stays": any(isinstance(part, Drafter) for part in module.modules()),
        "a 4-bit model": any(isinstance(part, Nf4Linear) for part in module.modules()),
        "train.optimizer = 'adamw8bit'": config.optimizer != "adamw",
        "train.offload": config.offload is not None,
        "residual inputs": any(getattr(part, "residual", None) is not None for part in module.modules()),
        "a loss that asks the parent under the adapters": adapted and reads_teacher,
    }
    for what in (name for name, is_asked_for in refused.items() if is_asked_for):
        raise ConfigError(f"{what} and a sharded model", "use ddp.json, where each process holds the whole model")


def open_shards(
    accelerator: Accelerator, module: nn.Module, config: TrainConfig, reads_teacher: bool
) -> "Shards | None":
    """The sharded twin of a module where the launcher asks for one; None where each process holds the whole.

    Raises `ConfigError` for what cannot be sharded.
    """
    if not wants_shards() or accelerator.num_processes == 1:
        return None
    check_shardable(module, config, reads_teacher)
    return Shards(accelerator, module)


class Shards:
    """The sharded twin of a module that holds a `DiffusionModel`, and the way back to the whole one.

    `module` is what trains. The whole one, which the rest of a stage knows, rests meanwhile: in the main process in
    the computer's memory, in the others nowhere (meta).
    """

    def __init__(self, accelerator: Accelerator, whole: nn.Module) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.accelerator, self.whole = accelerator, whole
        self.device = _model_of(whole).device
        shared: dict[int, Any] = {id(tensor): tensor for tensor in [*whole.parameters(), *whole.buffers()]}
        self.module: Any = copy.deepcopy(whole, shared)
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        # Autocast computes in bf16, as it does without shards; FSDP's own policy would round other things.
        reshard = _on("FSDP_RESHARD_AFTER_FORWARD", {"FSDP_RESHARD_AFTER_FORWARD": "true", **os.environ})
        for layer in _model_of(self.module).causal_lm.model.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
        # Embeddings and head stay gathered between a forward and its backward: both use them.
        fully_shard(self.module, mesh=mesh, reshard_after_forward=False)
        whole.to("cpu" if accelerator.is_main_process else "meta")

    @contextlib.contextmanager
    def readable(self) -> Iterator[None]:
        """Within the context the module's parts may be called from outside its forward, in all processes alike."""
        self.module.unshard()
        try:
            yield
        finally:
            for part in self.module.modules():
                if hasattr(part, "reshard"):  # without a backward pass nobody else lets the whole layers go
                    part.reshard()

    @torch.no_grad()
    def gather(self) -> None:
        """Bring the whole module of the main process up to date. All processes must call it."""
        resting = dict(self.whole.named_parameters())
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                whole = whole_tensor(parameter)
                if self.accelerator.is_main_process:
                    resting[name].copy_(whole)

    def end(self) -> None:
        """Gather, and put the main process's whole module back where it was."""
        self.gather()
        if self.accelerator.is_main_process:
            self.whole.to(self.device)


def _model_of(module: nn.Module) -> DiffusionModel:
    return next(part for part in module.modules() if isinstance(part, DiffusionModel))


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor's value from all its pieces; one in one piece as it is. All processes must call it."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def laid_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The same value (of the same shape) in the pieces of a parameter; all processes must call it. One in one piece
    asks for nothing."""
    if not hasattr(parameter, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    pieces: Any = parameter
    return distribute_tensor(tensor.to(pieces.device), pieces.device_mesh, pieces.placements)


def clip_gradients(accelerator: Accelerator, module: nn.Module, most: float) -> Float[Tensor, ""]:
    """Scale the gradients down to a norm of `most` at most; returns the norm they had, over all pieces."""
    parameters = list(module.parameters())
    if any(hasattr(parameter, "full_tensor") for parameter in parameters):
        return whole_tensor(nn.utils.clip_grad_norm_(parameters, most))
    norm: Tensor = accelerator.clip_grad_norm_(parameters, most)
    return norm
