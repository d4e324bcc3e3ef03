"""How a model trains on one process or many: thin wrappers of torch.distributed.

`torchrun` starts the processes; without it there is one. Frozen parameters are replicated or sharded like all others.
"""

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from g2vlm.errors import InputError
from g2vlm.supervision.base import Heads

_SHARDED = (
    "MoTLayer", "DinoV2", "FrameBlock", "ContextBlock", "Qwen2VLVisionBlock", "Qwen2VLDecoderLayer",
    "Qwen2_5_VLVisionBlock", "Qwen2_5_VLDecoderLayer", "Qwen3VLVisionBlock", "Qwen3VLTextDecoderLayer",
)  # fmt: skip
_FLOAT32 = ("PixelHead", "CameraHead")
"""Output heads compute in float32 whatever the rest does; so do those of geometric supervision."""


class Engine:
    """One process, and what the others override. Every method is called on all ranks, in the same order."""

    rank = 0
    world = 1

    def __init__(self, device: torch.device):
        self.device = device

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call, its weights equal on all ranks (rank 0's). Parameters of `model` keep their names."""
        return model.to(self.device)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, without gradient."""
        return values.detach().clone()

    def backward(self, loss: Tensor) -> None:
        """Gradients of the mean over ranks of their losses."""
        loss.backward()

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Scale gradients to a norm of at most `max_norm`; returns the norm before, equal on all ranks."""
        return nn.utils.clip_grad_norm_(parameters, max_norm)

    def whole(self, tensor: Tensor) -> Tensor:
        """The full tensor on the CPU, from this rank's part of it."""
        return tensor.detach().to("cpu", copy=True)

    def part(self, tensor: Tensor, like: Tensor) -> Tensor:
        """This rank's part of a full tensor, laid out like a parameter."""
        return tensor.to(like.device, copy=True)

    def barrier(self) -> None:
        """Wait for all ranks."""


class Replicated(Engine):
    """DistributedDataParallel: a float32 replica on every rank."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def wrap(self, model: nn.Module) -> nn.Module:
        """A replica whose gradients are averaged; parameters without a gradient in a step are allowed."""
        return DistributedDataParallel(model.to(self.device), find_unused_parameters=True)

    def sum(self, values: Tensor) -> Tensor:
        """One all-reduce."""
        total = values.detach().clone()
        dist.all_reduce(total)
        return total

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()


class Sharded(Replicated):
    """FSDP2: parameters, gradients and optimizer state sharded; bfloat16 compute over float32 masters on GPUs."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """Shards of blocks, of output heads, and of the rest."""
        warnings.filterwarnings("ignore", ".*returned a view tensor")  # nothing here writes in place
        model.to(self.device)
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.data, src=0)
        compute = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        mesh = init_device_mesh(self.device.type, (self.world,))
        low = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        full = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
        supervision = [module for module in model.modules() if isinstance(module, Heads)]
        for heads in supervision:
            fully_shard(heads, mesh=mesh, mp_policy=full)
        sharded = {part for heads in supervision for part in heads.modules()}
        for module in [own for own in model.modules() if own not in sharded]:
            if type(module).__name__ in _SHARDED + _FLOAT32:
                fully_shard(module, mesh=mesh, mp_policy=full if type(module).__name__ in _FLOAT32 else low)
        fully_shard(model, mesh=mesh, mp_policy=low)
        return model

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """The norm over all shards."""
        norm = super().clip(parameters, max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def whole(self, tensor: Tensor) -> Tensor:
        """Gathered from all ranks."""
        return super().whole(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)

    def part(self, tensor: Tensor, like: Tensor) -> Tensor:
        """This rank's shard."""
        if not isinstance(like, DTensor):
            return super().part(tensor, like)
        return distribute_tensor(tensor.to(self.device), like.device_mesh, like.placements)


@contextmanager
def engine(name: str = "auto", device: str | None = None) -> Iterator[Engine]:
    """The engine for the processes that torchrun started, or for one; leaves the process group at the end.

    Args:
        name: `ddp`, `fsdp2`, or `auto`: fsdp2 on GPUs, ddp on CPUs.
        device: cpu or cuda; by default a GPU when there is one.

    Raises:
        InputError: a GPU is asked for and there is none.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("no GPU for runtime.device cuda", "torch finds no CUDA device", "set runtime.device to cpu")
    if name == "auto":
        name = "fsdp2" if kind == "cuda" else "ddp"
    launched = "WORLD_SIZE" in os.environ
    if not launched and name == "ddp":
        yield Engine(torch.device(kind))
        return
    yield from _distributed(name, kind, launched)


def _distributed(name: str, kind: str, launched: bool) -> Iterator[Engine]:
    place = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(place)
    store: Any = getattr(dist, "HashStore")  # noqa: B009 (missing in the stubs)
    options: dict[str, Any] = {} if launched else {"store": store(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", **options)
    try:
        yield (Sharded if name == "fsdp2" else Replicated)(place)
    finally:
        dist.destroy_process_group()
