"""Weights of which each process holds a part: FSDP2 (`fully_shard`), tensor parallelism, DeepSpeed ZeRO.

Such a parameter is a DTensor, or stands for a `FlatSlice`. The library works on the tensor behind it, the process's own
shard, to which training writes in place: an average of shards is the shard of the average, so nothing is ever
communicated.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

if TYPE_CHECKING:
    from torch import Tensor, nn


def is_shard(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor or a `FlatSlice`, of which this process may hold only a part."""
    return hasattr(tensor, "to_local")


def is_sharded(model: nn.Module) -> bool:
    """Whether this process may hold only a part of a parameter of ``model``."""
    return any(is_shard(p) or is_flat(p) for p in model.parameters()) or any(
        getattr(part, "is_sharded", True) for part in fsdp_modules(model)
    )


def if_sharded(model: nn.Module) -> nn.Module | None:
    """``model`` where each process is to take its part of a whole state; None where it takes all."""
    return model if is_sharded(model) else None


def is_flat(parameter: Tensor | None) -> bool:
    """Whether ``parameter`` stands for a slice that training writes to elsewhere: for what `slices` gives."""
    zero = _zero()
    return zero is not None and zero.holds(parameter)


def slices(model: nn.Module) -> dict[int, Tensor | Mapping[str, Tensor]]:
    """The parameters of ``model`` that an engine has flattened: their ids → `FlatSlice`.

    Where one stands for several: its id → name in the module that it is in → `FlatSlice`.

    Raises:
        ValueError: the engine keeps them in a way that is not supported.
    """
    engines = [engine for engine in (_zero(), _fsdp1()) if engine is not None]
    return {id(parameter): flat for engine in engines for parameter, flat in engine.slices(model)}


def steps(model: object) -> int | None:
    """How many optimizer steps ``model`` itself has counted, as DeepSpeed's engine does; None for any other."""
    zero = _zero()
    count: int | None = None if zero is None else zero.steps(model)
    return count


def _zero() -> Any:
    """What is special about DeepSpeed ZeRO, if DeepSpeed was imported."""
    if "deepspeed" not in sys.modules:
        return None
    from averaging import zero

    return zero


def _fsdp1() -> Any:
    """What is special about FSDP1, if FSDP was imported."""
    if "torch.distributed.fsdp" not in sys.modules:
        return None
    from averaging import fsdp1

    return fsdp1


def local(tensor: Tensor) -> Tensor:
    """What this process holds of ``tensor``: a view of the shard or slice, any other tensor itself."""
    if not is_shard(tensor):
        return tensor
    with torch.no_grad():
        shard: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return shard.detach().requires_grad_(tensor.requires_grad)


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules to which `fully_shard` was applied, and those wrapped in FSDP1, each of which can ``reshard``."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where it was not imported, there is none
    if fsdp is None:
        return []
    return [*(part for part in model.modules() if isinstance(part, fsdp.FSDPModule)), *_fsdp1().units(model)]


def reshard(model: nn.Module) -> None:
    """Let the parameters of ``model`` be the shards that are trained, not what a forward pass gathered from them.

    FSDP2 keeps what the root's forward pass has gathered until a backward pass is over. After one without gradients,
    what is written to the shards would not reach the next forward pass, and `model.parameters()` would not be the
    shards; and so with FSDP1. Nothing is communicated.
    """
    for part in fsdp_modules(model):
        part.reshard()


def shown(tensor: Tensor) -> Tensor | None:
    """What the model computes with instead of the `local` part of ``tensor``, if that is not what it computes with."""
    return getattr(tensor, "shown", None)


def publish(model: nn.Module, written: Iterable[Tensor]) -> None:
    """Let ``model`` compute with what was written to the `local` parts of these tensors. All processes call this."""
    for tensor in written:
        if shown(tensor) is not None:
            tensor.publish()  # type: ignore[attr-defined]
    forget_gathered(model)


def forget_gathered(model: nn.Module) -> None:
    """Let the next forward pass gather anew, after something was written. Nothing is communicated."""
    if (zero := _zero()) is not None:
        zero.release(model)


def abandon_forward(model: nn.Module) -> None:
    """`reshard` after an exception, which may have cut off a forward pass that FSDP would hold to be under way."""
    inside: set[nn.Module] = set()
    for part in fsdp_modules(model):
        # Of nested ones the outermost, which comes first, knows of the others. (torch before 2.13 cannot do it.)
        if hasattr(part, "reset_iter_state") and part not in inside:
            part.reset_iter_state()
            inside.update(part.modules())
    if (fsdp1 := _fsdp1()) is not None:
        fsdp1.abandon_forward(model)
    reshard(model)


def process() -> list[int]:
    """The rank of this process, and how many there are."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [0, 1]
    return [distributed.get_rank(), distributed.get_world_size()]
