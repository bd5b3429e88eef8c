"""BatchNorm recalibration: the running statistics of an average, recomputed from training batches.

    μ ← Σᵢ μᵢ / n,   σ² ← Σᵢ σ²ᵢ / n      over n batches, each with the batch's mean and unbiased variance

The running statistics that BatchNorm collects while training are those of the online weights; under the average the
activations are distributed otherwise. Izmailov et al. 2018 (arXiv:1803.05407), section 3.2, and PyTorch's `update_bn`
for the cumulative mean once the average is taken; Wu and Johnson 2021 (arXiv:2105.07576) for how many batches that
needs: 10³ to 10⁴ samples.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from averaging.apply import applied, load_into
from averaging.kernels import accumulator_dtype
from averaging.weights import every_name, unwrap

if TYPE_CHECKING:
    from torch import Tensor

    from averaging.averager import Averager
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
        stack.enter_context(random_state_kept())
        stack.enter_context(_collecting(model, layers))
        batches = islice(batches, limit)
        if any(isinstance(layer, nn.SyncBatchNorm) for layer in layers):
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
    owned = [(layer, layer.momentum, layer._parameters.copy(), layer._buffers.copy()) for layer in layers]
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
    """``batches`` until one process has no more: a SyncBatchNorm layer would wait for it for ever."""
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


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Python's, numpy's and torch's random state are after the block what they were before."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
