"""Put an average into a model: for a while (`applied`), or for good (`load_into`)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from averaging.kernels import rounded
from averaging.shards import abandon_forward, forget_gathered, local, publish, reshard, shown
from averaging.weights import Weights, every_filed_name

if TYPE_CHECKING:
    from torch import Tensor, nn

    from averaging.averager import Average


@contextmanager
def applied(model: nn.Module, weights: Average | Weights) -> Iterator[Weights]:
    """Within the ``with`` block, ``model`` holds ``weights``; afterwards its own again, bit for bit.

    Tensors are paired by name and copied in place, so optimizers, compiled graphs and DDP keep working.
    The model's own weights come back also after an exception or Ctrl-C, whatever happened inside.
    Where the model is sharded (FSDP2, tensor parallelism, ZeRO) each process does this with its own shards. Only under
    ZeRO-1 and ZeRO-2 is something communicated, on the way in.

        with applied(model, ema):
            evaluate(model)

    Args:
        model: the model, wrapped or not.
        weights: an averager or one of its `views`, or name → tensor for some or all parameters and buffers.
            An averager that has absorbed nothing yet stands for the model's own weights.

    Yields:
        The model's own (online) weights of the tensors that were replaced: a copy in CPU memory.

    Raises:
        ValueError: a name the model does not have, or a shape that differs; the model is then unchanged.
    """
    pairs = _pair(model, weights)
    online = {name: local(target).detach().to("cpu", copy=True) for name, (target, _) in pairs.items()}
    # What was gathered is kept as well: when only this process has an exception, the others do not answer.
    gathered = [
        (copy, copy.to("cpu", copy=True)) for target, _ in pairs.values() if (copy := shown(target)) is not None
    ]
    try:
        _write([(local(target), source) for target, source in pairs.values()])
        publish(model, [target for target, _ in pairs.values()])
        yield online
    except BaseException:
        abandon_forward(model)
        raise
    finally:
        own = [(local(target), online[name]) for name, (target, _) in pairs.items()]
        _write_uninterrupted(model, [*own, *gathered])


def load_into(model: nn.Module, weights: Average | Weights) -> None:
    """Copy ``weights`` into ``model`` in place, each tensor rounded once to the model's dtype.

    Args:
        model: the model, wrapped or not.
        weights: an averager or one of its `views`, or name → tensor for some or all parameters and buffers.
            An averager that has absorbed nothing yet stands for the model's own weights.

    Raises:
        ValueError: a name the model does not have, or a shape that differs; the model is then unchanged.
    """
    pairs = _pair(model, weights).values()
    _write_uninterrupted(model, [(local(target), source) for target, source in pairs])
    publish(model, [target for target, _ in pairs])


def _pair(model: nn.Module, weights: Average | Weights) -> Mapping[str, tuple[Tensor, Tensor]]:
    """(target in the model, source) by name, all checked before anything is written."""
    if not isinstance(weights, Mapping):
        if not weights.ready:
            return {}
        weights = weights.average(rounded=True)
    targets = dict(every_filed_name(model))
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    written: dict[int, str] = {}
    for name, source in weights.items():
        target = targets.get(name)
        if target is None:
            raise ValueError(f"the model has no parameter or buffer {name!r}: these are the weights of another model")
        if (shape := local(target).shape) != source.shape:
            raise ValueError(
                f"{name!r} has shape {tuple(shape)} in the model and {tuple(source.shape)} in the weights: "
                "these are the weights of another model"
            )
        if (twin := written.setdefault(id(target), name)) != name:
            # Files of a tied model may hold the weight under each of its names.
            if not torch.equal(pairs[twin][1], source):
                raise ValueError(f"{twin!r} and {name!r} are one tied weight in the model but differ in the weights")
            continue
        pairs[name] = (target, source)
    return pairs


@torch.no_grad()
def _write(pairs: Collection[tuple[Tensor, Tensor]]) -> None:
    for target, source in pairs:
        # Other conversions round once by themselves.
        target.copy_(rounded(source, target.dtype) if source.dtype == torch.float64 else source)


def _write_uninterrupted(model: nn.Module, pairs: Collection[tuple[Tensor, Tensor]]) -> None:
    """Write all ``pairs`` even if Ctrl-C is pressed meanwhile: half of one set of weights is none."""
    interrupted: KeyboardInterrupt | None = None
    while True:
        try:
            reshard(model)  # or it would go on with what an evaluation has gathered
            _write(pairs)
            forget_gathered(model)
            break
        except KeyboardInterrupt as exception:
            interrupted = exception
    if interrupted is not None:
        raise interrupted
