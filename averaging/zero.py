"""DeepSpeed ZeRO: a flat float32 partition in each process is what is trained.

Stages 1 and 2 partition all parameters of a group as one row of numbers, so that a process holds slices of some of them
and nothing of the others; the model computes with whole parameters in low precision, which are gathered after each
step. Stage 3 cuts each parameter on its own, and gathers its low-precision copy whenever a module needs it.

Everything is found from the parameters themselves, so that the model inside of the engine will do.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn

from averaging.flat_slice import FlatSlice


class _Gathered(FlatSlice):
    """A parameter of stage 1 or 2: ``shown`` is whole, in low precision."""

    @torch.no_grad()
    def publish(self) -> None:
        assert self.shown is not None
        self.shown.copy_(self.with_piece(self.to_local().to(self.shown.device, self.shown.dtype)).full_tensor())


class _Partitioned(FlatSlice):
    """A parameter of stage 3: ``shown`` is this process's slice in low precision."""

    @torch.no_grad()
    def publish(self) -> None:
        assert self.shown is not None
        self.shown.copy_(self.to_local())


def _is_engine(model: Any) -> bool:
    return isinstance(model, sys.modules["deepspeed"].DeepSpeedEngine)


def holds(parameter: Any) -> bool:
    """Whether DeepSpeed trains a slice of ``parameter`` elsewhere."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def slices(model: nn.Module) -> Iterator[tuple[Tensor, FlatSlice]]:
    """The parameters of ``model`` that ZeRO partitions, and what this process holds of them.

    Raises:
        ValueError: an engine that keeps them where they cannot be averaged.
    """
    in_engine = _is_engine(model)
    inner: Any = model.module if in_engine else model
    for name, parameter in inner.named_parameters():
        if hasattr(parameter, "ds_id"):
            yield parameter, _of_stage_3(name, parameter, in_engine)
        elif hasattr(parameter, "_hp_mapping"):
            yield parameter, _of_stage_1_or_2(name, parameter)
    refuse_stage_0(model)


def refuse_stage_0(model: nn.Module) -> None:
    """Raise where ``model`` is an engine that trains in low precision without ZeRO.

    Raises:
        ValueError: what is trained are float32 weights that only the engine's optimizer knows.
    """
    if (
        _is_engine(model)
        and model.basic_optimizer not in (None, model.optimizer)  # one without, such as a reference's, trains nothing
        and not any(holds(parameter) for parameter in model.parameters())
    ):
        raise ValueError(
            "DeepSpeed without ZeRO keeps the float32 weights that it trains in 16 bits to itself, so that they cannot "
            "be averaged: set the zero_optimization stage to 1, 2 or 3, or use DDP"
        )


def _of_stage_1_or_2(name: str, parameter: Any) -> FlatSlice:
    _refuse_groups(name, parameter._dp_group)

    def piece() -> Tensor:
        mapping = parameter._hp_mapping  # another one after DeepSpeed has moved its states
        return torch.empty(0, device=parameter.device) if mapping is None else mapping.hp_fragment

    mapping = parameter._hp_mapping
    flat = _Gathered(piece, 0 if mapping is None else mapping.lp_fragment_address.start, parameter)
    flat.shown = parameter.detach()
    return flat


def _of_stage_3(name: str, parameter: Any, in_engine: bool) -> FlatSlice:
    _refuse_groups(name, parameter.ds_process_group)
    optimizer: Any = getattr(parameter, "_z3_optimizer", None)
    if optimizer is None:
        # An engine without one, such as a reference model's, has to be asked to forget what it has gathered.
        if not in_engine:
            raise _refusal(name, "without an optimizer", "give the engine that deepspeed.initialize returns")
    elif optimizer.swap_optimizer or optimizer.params_in_nvme_and_cpu:
        raise _refusal(name, "with offloading to NVMe", "offload to the CPU")
    elif optimizer.zero_hpz_partition_size > 1:
        raise _refusal(name, "with zero_hpz_partition_size, a second copy", "leave that out")
    size = parameter.ds_tensor.ds_numel  # the same in all processes, so that the last ones' are padded
    start = min(distributed.get_rank(parameter.ds_process_group) * size, parameter.ds_numel)
    count = min(size, parameter.ds_numel - start)

    def low() -> Tensor:
        part: Tensor = parameter.ds_tensor
        return part.narrow(0, 0, count)

    place = None if optimizer is None else optimizer.grad_position.get(optimizer.get_param_id(parameter))
    if place is None:  # frozen: there is no other
        return FlatSlice(low, start, parameter, parameter.ds_shape)
    group, first, _ = place
    flat = _Partitioned(
        lambda: optimizer.fp32_partitioned_groups_flat[group].narrow(0, first, count),
        start,
        parameter,
        parameter.ds_shape,
    )
    flat.shown = low()
    return flat


def release(model: nn.Module) -> None:
    """Let stage 3 forget what it has gathered, so that what is written to the slices reaches the next forward pass."""
    holders: set[Any] = {getattr(parameter, "_z3_optimizer", None) for parameter in model.parameters()}
    if _is_engine(model) and hasattr(model.optimizer, "empty_partition_cache"):
        holders.add(model.optimizer)  # of a model that is not trained
    for holder in holders - {None}:
        holder.empty_partition_cache()


def steps(model: Any) -> int | None:
    """Optimizer steps that an engine has done, not counting those skipped as gradients had overflowed; else None."""
    return model.global_steps - model.skipped_steps if _is_engine(model) else None


def _refuse_groups(name: str, group: Any) -> None:
    if distributed.get_world_size(group) != distributed.get_world_size():
        raise _refusal(name, "in some of the processes only (model, expert or pipeline parallel)", "partition over all")


def _refusal(name: str, what: str, way_out: str) -> ValueError:
    return ValueError(
        f"parameter {name!r} is held by DeepSpeed ZeRO {what}, which is not supported: {way_out}, use FSDP2 "
        "(fully_shard) or DDP, or average the saved checkpoints afterwards with `soup`"
    )
