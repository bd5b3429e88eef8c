"""BatchNorm recalibration: the running statistics of an average, recomputed from training batches.

    μ ← Σᵢ μᵢ / n,   σ² ← Σᵢ σ²ᵢ / n      over n batches, each with the batch's mean and unbiased variance

The running statistics that BatchNorm collects while training are those of the online weights; under the average the
activations are distributed otherwise. Izmailov et al. 2018 (arXiv:1803.05407), section 3.2, and PyTorch's `update_bn`
for the cumulative mean once the average is taken; Wu and Johnson 2021 (arXiv:2105.07576) for how many batches that
needs: 10³ to 10⁴ samples.
"""

from __future__ import annotations

import copy
import inspect
import random
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, IterableDataset

from averaging.apply import applied, load_into
from averaging.kernels import accumulator_dtype
from averaging.randomness import random_state
from averaging.shards import is_sharded
from averaging.weights import every_name, unwrap

if TYPE_CHECKING:
    from torch import Tensor

    from averaging.averager import Average, Averager
    from averaging.weights import Weights

Forward = Callable[[nn.Module, Any], Any]
"""Runs a model on a batch that is on the model's device; the result is ignored."""

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

LIMIT = 100
"""Batches that suffice: with 32 samples or more in each, within what Wu and Johnson found enough."""


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    limit: int | None = LIMIT,
    forward: Forward | None = None,
    layers: Collection[nn.Module] | None = None,
) -> None:
    """Recompute the running statistics of every BatchNorm layer for the weights that ``model`` holds.

        load_into(model, average)
        recalibrate(model, train_dataloader)

    The statistics are cumulative means over the batches (``momentum=None``), in float32 or better. Only the BatchNorm
    layers are in training mode meanwhile: dropout is off, as in the evaluations that the statistics are for. Modes,
    momenta and the random state (Python's, numpy's, torch's) are afterwards what they were. Where `torch.distributed`
    is initialised, every process calls this with batches of its own, and all get the mean over all of them.

    Costs a forward pass per batch, without gradients, under the autocast that is active.

    Args:
        model: the model, wrapped or not.
        batches: training batches, such as a DataLoader: large and shuffled, as in training. A mapping becomes keyword
            arguments (those that the model's ``forward`` takes); of a tuple or list, (input, target), the first element
            is used; anything else is the one argument. Tensors are moved to the model's device.
        limit: how many batches at most; ``None`` for all there are.
        forward: ``forward(model, batch)`` instead, for models that are called otherwise.
        layers: the BatchNorm layers to recalibrate; by default all that have running statistics. Leave out those that
            were kept frozen (in evaluation mode) during training. A layer that the forward pass does not reach keeps
            its statistics.

    Raises:
        ValueError: no batch, a limit below 1, a lazy layer that has not seen any input, or no layer reached.
    """
    load_into(model, statistics(model, batches, limit=limit, forward=forward, layers=layers))


@contextmanager
def recalibrated(
    model: nn.Module,
    average: Averager | Weights,
    batches: Iterable[Any],
    *,
    limit: int | None = LIMIT,
    forward: Forward | None = None,
    layers: Collection[nn.Module] | None = None,
) -> Iterator[None]:
    """Within the ``with`` block, ``model`` holds ``average`` and BatchNorm statistics recalibrated for it.

        with recalibrated(model, ema, train_dataloader):
            evaluate(model)

    Afterwards its own weights and statistics come back bit for bit, also after an exception. See `recalibrate` for the
    arguments; an averager that has absorbed nothing yet stands for the model as it is.
    """
    with applied(model, average) as online, ExitStack() as stack:
        if online:
            fresh = statistics(model, batches, limit=limit, forward=forward, layers=layers)
            stack.enter_context(applied(model, fresh))
        yield


def batchnorm_layers(model: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers of ``model`` that keep running statistics."""
    return [
        part
        for part in unwrap(model).modules()
        if isinstance(part, _BatchNorm) and part.track_running_stats and part.running_mean is not None
    ]


def statistics(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    limit: int | None = LIMIT,
    forward: Forward | None = None,
    layers: Collection[nn.Module] | None = None,
) -> dict[str, Tensor]:
    """What `recalibrate` writes into ``model``, which stays as it is: buffer name → tensor, for `load_into`."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit!r}: at least one batch is needed")
    model = unwrap(model)
    layers = batchnorm_layers(model) if layers is None else layers
    if not layers:
        return {}
    if any(is_lazy(layer.get_buffer(name)) for layer in layers for name in STATISTICS):
        raise ValueError("the model has lazy BatchNorm layers without any input so far: run it on a batch first")
    forward = forward or _forward
    device = next(tensor.device for _, tensor in every_name(model))
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # compiled code would be compiled once more for these few batches
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        # Trainers evaluate in inference mode, whose tensors could not be written to later.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.callback(random_state())
        stack.enter_context(_collecting(model, layers))
        batches = islice(batches, limit)
        if is_sharded(model) or any(isinstance(layer, nn.SyncBatchNorm) for layer in layers):
            batches = _while_all_have_one(batches, device)
        number = 0
        for number, batch in enumerate(batches, start=1):  # noqa: B007 (counted)
            forward(model, _moved(batch, device))
        collected = [[layer.get_buffer(name) for name in STATISTICS] for layer in layers]
        _reduce(collected, device)
    if not any(int(count) for _, _, count in collected):
        raise ValueError(
            "the forward pass reached no BatchNorm layer: give forward= the call that training makes"
            if number
            else "there was no batch to recompute the BatchNorm statistics from"
        )
    names: dict[int, str] = {}
    for name, tensor in every_name(model):
        names.setdefault(id(tensor), name)
    return {
        names[id(layer.get_buffer(name))]: tensor
        for layer, tensors in zip(layers, collected, strict=True)
        if int(tensors[-1])
        for name, tensor in zip(STATISTICS, tensors, strict=True)
    }


@contextmanager
def _collecting(model: nn.Module, layers: Collection[Any]) -> Iterator[None]:
    """Within the block the ``layers`` collect cumulative means in new buffers, and nothing else is in training mode."""
    modes = [(part, part.training) for part in model.modules()]
    owned = [(layer, layer.momentum, dict(layer._parameters), dict(layer._buffers)) for layer in layers]
    try:
        for part, _ in modes:
            part.training = False
        for layer in layers:
            layer.training = True
            layer.momentum = None  # stands for the cumulative mean
            for name in STATISTICS:
                layer._buffers[name] = torch.zeros_like(buffer := layer.get_buffer(name), dtype=_wide(buffer))
            # A layer takes half-precision input beside float32 statistics if its parameters are float32, too.
            for name, parameter in layer._parameters.items():
                if parameter is not None:
                    layer._parameters[name] = parameter.to(_wide(parameter))
        yield
    finally:
        for layer, momentum, parameters, buffers in owned:
            layer.momentum = momentum
            layer._parameters.update(parameters)
            layer._buffers.update(buffers)
        for part, mode in modes:
            part.training = mode


def _wide(tensor: Tensor) -> torch.dtype:
    return accumulator_dtype(tensor.dtype) if tensor.is_floating_point() else tensor.dtype


def _forward(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, list | tuple):
        batch = batch[0]
    if not isinstance(batch, Mapping):
        model(batch)
        return
    parameters = inspect.signature(model.forward).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        batch = {name: value for name, value in batch.items() if name in parameters}
    model(**batch)


def _moved(batch: Any, device: torch.device) -> Any:
    """``batch`` with its tensors on ``device``."""
    if callable(getattr(batch, "to", None)):  # tensors, tokenizers' batches, graphs
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _moved(value, device) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        values = [_moved(value, device) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def _distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _while_all_have_one(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """``batches`` until one process has no more: a sharded model or layer would wait for it for ever."""
    iterator = iter(batches)
    while True:
        try:
            batch, more = next(iterator), 1
        except StopIteration:
            batch, more = None, 0
        if _distributed():
            everywhere = torch.tensor(more, device=device)
            distributed.all_reduce(everywhere, distributed.ReduceOp.MIN)
            more = int(everywhere)
        if not more:
            return
        yield batch


def _reduce(collected: list[list[Tensor]], device: torch.device) -> None:
    """Replace each process's (mean, variance, batches) by those over the batches of all processes, in place."""
    if not _distributed():
        return
    sums = [
        torch.cat([mean.double() * count, variance.double() * count, count.double().view(1)])
        for mean, variance, count in collected
    ]
    total = torch.cat(sums).to(device)
    distributed.all_reduce(total)
    for (mean, variance, count), part in zip(collected, torch.split(total, [len(each) for each in sums]), strict=True):
        count.copy_(part[-1])
        if count:
            first, second = (part[:-1] / part[-1]).chunk(2)
            mean.copy_(first)
            variance.copy_(second)


# ---------------------------------------------------------------------- within a trainer's run


class Recalibration:
    """Statistics for the averages of a run, each recomputed when the average is used and has changed since.

    The training data are read from their beginning each time, from the same random state, so that an average gets the
    same statistics whenever it is used.

    Args:
        model: the model being trained.
        batches: opens a pass over the training batches that training does not notice; see `unnoticed`.
        forward: the call that training makes; see `recalibrate`.
        limit: batches at most.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Callable[[], AbstractContextManager[Iterable[Any]]],
        forward: Forward,
        limit: int,
    ) -> None:
        self._model = model
        self._batches = batches
        self._forward = forward
        self._limit = limit
        self._layers = batchnorm_layers(model)
        self._trained = self._layers
        self._known: dict[str, tuple[list[Any], Weights]] = {}

    def notice_frozen_layers(self) -> None:
        """Look, after a training step, which layers collect statistics; those kept in evaluation mode keep theirs."""
        trained = [layer for layer in self._layers if layer.training]
        if len(trained) != len(self._trained):
            self._trained = trained
            self._known.clear()

    def check(self) -> None:
        """Raise here, at the beginning, what would otherwise be raised when the first average is used."""
        self._measure(limit=1)

    def __call__(self, name: str, average: Average) -> Average:
        """``average`` with its statistics; ``name`` tells the averages of the run apart."""
        return _Recalibrated(self, name, average)

    def statistics(self, name: str, average: Weights) -> Weights:
        """The statistics for ``average``, which is in the dtype of the model's weights."""
        # An average may change without an absorption, and comparing with a copy would take the memory of one.
        sums = [
            tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float64)).item() for tensor in average.values()
        ]
        known = self._known.get(name)
        changed = known is None or known[0] != sums
        if _distributed() and is_sharded(self._model):  # the shard of another process may have changed
            anywhere = torch.tensor(int(changed), device=next(iter(average.values())).device)
            distributed.all_reduce(anywhere, distributed.ReduceOp.MAX)
            changed = bool(anywhere)
        if known is None or changed:
            with applied(self._model, average):
                known = self._known[name] = sums, self._measure(self._limit)
        return known[1]

    def _measure(self, limit: int) -> Weights:
        bring_back = random_state()
        seed = distributed.get_rank() if _distributed() else 0  # each process draws batches of its own
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        try:
            with self._batches() as batches:
                return statistics(self._model, batches, limit=limit, forward=self._forward, layers=self._trained)
        finally:
            bring_back()


class _Recalibrated:
    """An average together with BatchNorm statistics for it."""

    def __init__(self, recalibration: Recalibration, name: str, average: Average) -> None:
        self._recalibration, self._name, self._average = recalibration, name, average

    @property
    def ready(self) -> bool:
        return self._average.ready

    def average(self, *, rounded: bool = False) -> Weights:
        weights = self._average.average(rounded=True)
        fresh = self._recalibration.statistics(self._name, weights)
        return {**(weights if rounded else self._average.average()), **fresh}


@contextmanager
def unnoticed(loaders: Iterable[Any]) -> Iterator[list[Any]]:
    """Within the block, copies of data loaders that can be iterated over while training iterates over the loaders.

    What iterating changes in loaders, samplers and datasets, their random generators above all, is put back.

    Raises:
        ValueError: data that can be iterated over only once.
    """
    loaders = list(loaders)
    copies = [_copied(loader) for loader in loaders]
    parts, seen = [*loaders], set()
    with ExitStack() as afterwards:
        for part in parts:
            if id(part) in seen:
                continue
            seen.add(id(part))
            for value in getattr(part, "__dict__", {}).values():
                if isinstance(value, torch.Generator):
                    afterwards.callback(value.set_state, value.get_state())
                    value.manual_seed(0)
                elif isinstance(value, np.random.RandomState):
                    afterwards.callback(value.set_state, value.get_state())
                elif isinstance(value, np.random.Generator):
                    afterwards.callback(setattr, value.bit_generator, "state", value.bit_generator.state)
                elif isinstance(value, random.Random):
                    afterwards.callback(value.setstate, value.getstate())
            for role in ("dataset", "sampler", "batch_sampler"):
                inner = getattr(part, role, None)
                if hasattr(inner, "__dict__"):
                    parts.append(inner)
                    if role != "dataset":  # samplers may count their epochs
                        afterwards.callback(vars(inner).update, dict(vars(inner)))
        yield copies


def _copied(loader: Any) -> Any:
    """A loader of the same data that shares no iterator with ``loader``."""
    data = loader
    if isinstance(loader, DataLoader):
        loader = copy.copy(loader)
        loader._iterator = None  # that of persistent workers, which training is using
        data = loader.dataset
        if isinstance(data, IterableDataset):
            vars(loader)["dataset"] = copy.copy(data)  # may count what it has yielded
        else:
            return loader
    if any(isinstance(part, Iterator) for part in (data, *getattr(data, "__dict__", {}).values())):
        raise ValueError(f"the training data ({type(data).__name__}) can be iterated over only once")
    return loader
