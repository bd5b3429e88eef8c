"""Named weights: what a model, a snapshot and a checkpoint have in common."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.parameter import is_lazy

from averaging.checkpoints.checkpoint import in_adapter_file
from averaging.shards import fsdp_modules, is_flat, is_shard, local, reshard, slices

if TYPE_CHECKING:
    from torch import Tensor

Weights = Mapping[str, "Tensor"]
"""A mapping from parameter name to tensor."""

# Path components that wrappers insert into the names of a model's parameters.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel, DeepSpeed's engine and torch.compile's wrapper."""
    deepspeed = sys.modules.get("deepspeed")
    wrappers = (
        nn.parallel.DistributedDataParallel,
        nn.DataParallel,
        *([deepspeed.DeepSpeedEngine] if deepspeed else []),
    )
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _averageable(tensor: Tensor) -> bool:
    # One byte floats are storage formats of quantised models: they have no arithmetic.
    return (tensor.is_floating_point() or tensor.is_complex()) and (tensor.itemsize > 1)


def _refuse_engines(module: nn.Module) -> None:
    """Raise for engines whose parameters are not where training writes: their average would be silently wrong."""
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"parameter {name!r} is on the meta device, without values: materialize the model first")


def _refuse_lazy(name: str, tensor: Tensor) -> None:
    """Raise for a tensor whose shape is not known yet."""
    if is_lazy(tensor):
        raise ValueError(f"{name!r} is in a lazy module that has not seen any input so far: run it on a batch first")


def _behind(
    name: str, parameter: Tensor, flat: Mapping[int, Tensor | Mapping[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """What a parameter stands for, under all names that it has in the bare model; ``flat`` are the model's `slices`."""
    behind = flat.get(id(parameter), parameter)
    if isinstance(behind, Mapping):
        module, dot, _ = name.rpartition(".")
        yield from ((_plain(f"{module}{dot}{inner}"), part) for inner, part in behind.items())
    else:
        yield _plain(name), behind


def _once(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor under its first name."""
    seen: set[int] = set()
    for name, tensor in named:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that a checkpoint holds: the others are computed from the configuration."""
    passing = {
        id(part._buffers[key])
        for part in module.modules()
        for key in getattr(part, "_non_persistent_buffers_set", ())  # which scripted modules do not have
    }
    return ((name, buffer) for name, buffer in module.named_buffers() if id(buffer) not in passing)


class Binding:
    """The tensors of a model that are averaged, found once and checked cheaply ever after.

    Walking a large model's modules costs as much as averaging a small one's weights. The walk is repeated
    only when a parameter was replaced, frozen or unfrozen since.

    Attributes:
        tensors: name → parameter or buffer, as it is in the model.
    """

    def __init__(self, module: nn.Module, *, frozen: bool = False, buffers: bool = False) -> None:
        self.module = module
        inner = unwrap(module)
        _refuse_engines(inner)
        self._sharding = fsdp_modules(module)  # of which torch.compile's wrapper may be one
        reshard(module)
        flat = slices(module)
        self._watched: list[tuple[dict[str, Tensor | None], str, Tensor, bool]] = []
        self.tensors: dict[str, Tensor] = {}
        seen: set[int] = set()
        for prefix, part in inner.named_modules():
            # A scripted module's parameters are no dict, and none of them can be replaced.
            owner = part._parameters if isinstance(part._parameters, dict) else dict(part._parameters.items())
            for key, parameter in owner.items():
                if parameter is None or id(parameter) in seen:
                    continue
                # By identity: a tied weight counts once, under its first name.
                seen.add(id(parameter))
                self._watched.append((owner, key, parameter, parameter.requires_grad))
                name = f"{prefix}.{key}" if prefix else key
                _refuse_lazy(_plain(name), parameter)
                if _averageable(parameter) and (frozen or parameter.requires_grad):
                    self.tensors.update(_once(_behind(name, parameter, flat)))
        if buffers:
            for name, buffer in _persistent_buffers(inner):
                if _averageable(buffer):
                    self.tensors[_plain(name)] = buffer
        if not self.tensors:
            raise ValueError(
                f"{type(inner).__name__} has nothing to average: none of its floating-point parameters requires "
                "grad. Unfreeze some before training starts, or pass frozen=True to average frozen ones too"
            )

        self._sample = next((weight for _, _, weight, trained in self._watched if trained), None)
        self._sample_is_flat = is_flat(self._sample)
        self._whole = not any(is_shard(tensor) for tensor in self.tensors.values())

    @property
    def weights(self) -> Weights:
        """What this process holds of the tensors."""
        # Afresh each time: FSDP2 may exchange the tensor behind a parameter, which stays the same object.
        return self.tensors if self._whole else {name: local(tensor) for name, tensor in self.tensors.items()}

    def is_current(self, module: nn.Module) -> bool:
        """Whether ``module`` is the model bound, with the same parameters, frozen as they were."""
        for part in self._sharding:
            part.reshard()
        if is_flat(self._sample) is not self._sample_is_flat:
            return False  # an engine has taken the model over
        # A plain loop: this runs at every update, and a generator would take three times as long.
        for owner, key, parameter, trained in self._watched:
            if owner.get(key) is not parameter or parameter.requires_grad is not trained:
                return False
        return module is self.module


def named_weights(model: nn.Module, *, frozen: bool = False, buffers: bool = False) -> dict[str, Tensor]:
    """The weights of ``model`` that averaging is about: name → tensor, sharing the model's memory.

    By default its floating-point (or complex) parameters that require grad, each once: a tied weight appears
    under its first name only. Names are those of the bare model, without what DistributedDataParallel and
    torch.compile add to them. Of a model that is sharded by FSDP2 or tensor parallelism, the tensors are the shards
    that this process holds.

    Args:
        model: the model, wrapped or not.
        frozen: also the parameters that do not require grad.
        buffers: also the floating-point buffers that checkpoints hold (BatchNorm's running statistics).

    Raises:
        ValueError: nothing to average, or the model is sharded by an engine that is not supported.
    """
    return {name: tensor.detach() for name, tensor in Binding(model, frozen=frozen, buffers=buffers).weights.items()}


def every_tensor(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers of ``model`` under all their names, those of tied weights included."""
    inner = unwrap(model)
    reshard(model)
    flat = slices(model)
    for name, tensor in (*inner.named_parameters(remove_duplicate=False), *inner.named_buffers(remove_duplicate=False)):
        _refuse_lazy(_plain(name), tensor)
        yield from _behind(name, tensor, flat)


def every_name(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """`every_tensor`, of a sharded one what this process holds: one object under each name of a tied weight."""
    shards: dict[int, Tensor] = {}
    for name, tensor in every_tensor(model):
        if is_shard(tensor):
            tensor = shards.setdefault(id(tensor), local(tensor))
        yield name, tensor


def every_filed_name(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """`every_tensor`, and what PEFT trains also under its name in the adapter's file."""
    adapted = hasattr(unwrap(model), "peft_config")
    for name, tensor in every_tensor(model):
        yield name, tensor
        if adapted and (filed := in_adapter_file(name)) != name:
            yield filed, tensor


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a file of ``model`` holds: its parameters and persistent buffers, as they are in it, each once."""
    inner = unwrap(model)
    reshard(model)
    flat = slices(model)
    return {
        first: stored
        for name, tensor in (*inner.named_parameters(), *_persistent_buffers(inner))
        for first, stored in _once(_behind(name, tensor, flat))
    }


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name that ``model.state_dict()`` may use → the name under which `named_weights` has that tensor."""
    reshard(model)
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(tensor), _plain(name))
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        )
    }
