"""FullyShardedDataParallel (FSDP1): a wrapped module's parameters are one row of numbers, a stretch of it per process.

That stretch is trained, in the dtype that the model had, and what a forward pass computes with is gathered from it. It
stays as long as the engine lives, whereas what the parameters are depends on how far a forward or backward pass is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import HandleTrainingState, TrainingState, _no_dispatch_record_stream
from torch.distributed.utils import _free_storage

from averaging.flat_slice import FlatSlice
from averaging.shards import is_shard

WAY_OUT = "use FSDP2 (fully_shard) or DDP, or average the saved checkpoints afterwards with `soup`"


class Unit:
    """A wrapped module with parameters of its own."""

    def __init__(self, module: Any) -> None:
        self._module, self._handle = module, module._handle

    @property
    def is_sharded(self) -> bool:
        """Whether parameters stand for slices: not with NO_SHARD or in a single process, if they are the original."""
        return bool(self._handle.uses_sharded_strategy) or self._handle.flat_param._params is None

    def slices(self) -> Iterator[tuple[Tensor, FlatSlice | Mapping[str, FlatSlice]]]:
        """The parameters of which this process may hold only a part, and that part.

        Without ``use_orig_params`` there is one parameter, and of each original one a part, under all the names that
        it has in the module.

        Raises:
            ValueError: they are sharded once more.
        """
        row = self._handle.flat_param
        if any(extension is not None for extension in row._param_extensions):
            raise ValueError(f"FullyShardedDataParallel (FSDP1) of parallel tensors is not supported: {WAY_OUT}")
        parts = zip(row._params or [row] * len(row._shapes), row._shapes, row._shard_param_infos, strict=True)
        if row._params is None:
            named = dict(zip(row._fqns, (self._slice(*part) for part in parts), strict=True))
            for key, _, module, first_key, _, first_module in row._shared_param_infos:
                named[_joined(module, key)] = named[_joined(first_module, first_key)]
            yield row, named
        elif self.is_sharded:
            for part in parts:
                yield part[0], self._slice(*part)

    def _slice(self, parameter: Tensor, shape: torch.Size, info: Any) -> FlatSlice:
        row, start, count = self._handle.flat_param, info.offset_in_shard or 0, info.numel_in_shard or 0

        def piece() -> Tensor:
            trained: Tensor = getattr(row, "_local_shard", row)  # which the first forward pass sets
            return trained.detach().narrow(0, start, count)

        return FlatSlice(piece, info.intra_param_start_idx or 0, parameter, shape)

    def managed(self) -> Iterator[int]:
        """The ids of the parameters that the wrapper knows of."""
        row = self._handle.flat_param
        for parameter in (row, *(row._params or ()), *self._module._ignored_params):
            yield id(parameter)

    def reshard(self) -> None:
        """Let the parameters be those that are trained, and the next pass gather anew. Nothing is communicated."""
        row, handle = self._handle.flat_param, self._handle
        # In low precision, and in full where an evaluation is to compute in that.
        names = ("_full_param_padded", "_full_prec_full_param_padded")
        wholes = [whole for name in names if (whole := getattr(row, name, None)) is not None]
        if not any(whole.untyped_storage().size() for whole in wholes):
            return
        self._show_trained()
        for whole in wholes:
            _no_dispatch_record_stream(whole, handle._device_handle.current_stream())
            _free_storage(whole)

    def _show_trained(self) -> None:
        self._handle.reshard(free_unsharded_flat_param=False)
        self._handle.post_reshard()
        self._handle._prefetched = False

    def abandon_forward(self) -> None:
        """Let the parameters be those that are trained though FSDP1 holds a forward pass to be under way."""
        if self._module._is_root is not None:  # else none has begun so far
            self._handle._training_state = HandleTrainingState.IDLE
            self._show_trained()


def _joined(module: str, key: str) -> str:
    return f"{module}.{key}" if module else key


def units(model: nn.Module) -> list[Unit]:
    """The modules in ``model`` that FSDP1 has wrapped."""
    return [Unit(part) for part in _wrappers(model) if part._handle is not None]


def _wrappers(model: nn.Module) -> list[FullyShardedDataParallel]:
    return [part for part in model.modules() if isinstance(part, FullyShardedDataParallel)]


def abandon_forward(model: nn.Module) -> None:
    """Forget a forward pass that an exception has cut off."""
    for wrapper in _wrappers(model):
        wrapper.training_state = TrainingState.IDLE
    for unit in units(model):
        unit.abandon_forward()


def slices(model: nn.Module) -> Iterator[tuple[Tensor, FlatSlice | Mapping[str, FlatSlice]]]:
    """The parameters of ``model`` that FSDP1 shards, and what this process holds of them.

    Of one that stands for several: their names in the module that it is in → what this process holds.

    Raises:
        ValueError: some cannot be averaged, or ``model`` is what FSDP1 has wrapped, without the wrapper.
    """
    known: set[int] = set()
    for unit in units(model):
        known.update(unit.managed())
        yield from unit.slices()
    if any(is_shard(parameter) for parameter in model.parameters()):
        return  # FSDP2, which marks its modules as FSDP1 does
    for part in model.modules():
        own = {id(parameter) for parameter in part._parameters.values() if parameter is not None}
        if getattr(part, "_is_fsdp_managed_module", False) and not own <= known:
            raise ValueError(
                "this is the inside of a model in FullyShardedDataParallel (FSDP1), which alone knows what the "
                "parameters are: give the wrapped model"
            )
