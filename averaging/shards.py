"""Weights of which each process holds a part: PyTorch's FSDP2 (`fully_shard`) and tensor parallelism.

Such a parameter is a DTensor. The library works on the tensor behind it, the process's own shard, to which training
writes in place: an average of shards is the shard of the average, so nothing is ever communicated.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

if TYPE_CHECKING:
    from torch import Tensor, nn


def is_shard(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor, of which this process may hold only a part."""
    return hasattr(tensor, "to_local")


def is_sharded(model: nn.Module) -> bool:
    """Whether this process may hold only a part of a parameter of ``model``."""
    return any(is_shard(parameter) for parameter in model.parameters()) or bool(fsdp_modules(model))


def local(tensor: Tensor) -> Tensor:
    """What this process holds of ``tensor``: a view of a DTensor's shard, any other tensor itself."""
    if not is_shard(tensor):
        return tensor
    with torch.no_grad():
        shard: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return shard.detach().requires_grad_(tensor.requires_grad)


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules to which `fully_shard` was applied."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where it was not imported, there is none
    return [] if fsdp is None else [part for part in model.modules() if isinstance(part, fsdp.FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Let the parameters of ``model`` be the shards that are trained, not what a forward pass gathered from them.

    FSDP2 keeps what the root's forward pass has gathered until a backward pass is over. After one without gradients,
    what is written to the shards would not reach the next forward pass, and `model.parameters()` would not be the
    shards. Nothing is communicated.
    """
    for part in fsdp_modules(model):
        part.reshard()


def abandon_forward(model: nn.Module) -> None:
    """`reshard` after an exception, which may have cut off a forward pass that FSDP2 would hold to be under way."""
    inside: set[nn.Module] = set()
    for part in fsdp_modules(model):
        # Of nested ones the outermost, which comes first, knows of the others. (torch before 2.13 cannot do it.)
        if part not in inside and hasattr(part, "reset_iter_state"):
            part.reset_iter_state()
        inside.update(part.modules())
    reshard(model)


def process() -> list[int]:
    """The rank of this process, and how many there are."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [0, 1]
    return [distributed.get_rank(), distributed.get_world_size()]
