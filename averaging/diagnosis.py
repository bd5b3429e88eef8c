"""What is the matter with an average: does it move, is it all there, what is it evaluated with?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from averaging import kernels
from averaging.averagers.ema import EMA
from averaging.batchnorm import batchnorm_layers
from averaging.weights import every_name

if TYPE_CHECKING:
    from averaging.averager import Averager
    from averaging.weights import Weights

LARGE = 0.5
"""The share from which a stall, or the weights that an average began with, is a finding."""


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found; as a text, a line of figures and a line for each finding."""

    name: str
    """What the average is called."""
    step: int
    """Optimizer steps done."""
    absorbed: int
    """How many times weights were absorbed."""
    distance: float
    """‖average − θ‖ / ‖θ‖, θ the online weights."""
    apart: float
    """The share of entries in which the average, rounded to the model's dtype, is not the online weight."""
    stalled: float
    """Of an EMA, the share of entries apart that absorbing θ would not move at all, for want of precision."""
    first: float
    """Of an EMA, the share of what it first absorbed in what it is now."""
    narrow: tuple[str, ...]
    """Tensors of the average that are kept in less than float32."""
    nonfinite: tuple[str, ...]
    """Tensors of the average that hold NaN or infinity."""
    untracked: tuple[str, ...]
    """Parameters that require grad and are not averaged."""
    frozen: tuple[str, ...]
    """Parameters that are averaged as trained ones and no longer require grad."""
    foreign: tuple[str, ...]
    """Tensors of the average that the model does not have."""
    stale: tuple[str, ...]
    """Running statistics of the online weights, with which the average is evaluated."""

    @property
    def findings(self) -> list[str]:
        """What is the matter and what to do, one sentence or two for each finding; empty when all is well."""
        found = []
        if not self.absorbed:
            found.append("nothing was absorbed yet: the average stands for the online weights")
        elif not self.apart:
            found.append("the average is the online weights: they were loaded from it, or it is of one snapshot only")
        if self.first > LARGE:
            found.append(
                f"{self.first:.0%} of the average is still what it first absorbed, {self.absorbed} absorptions ago: "
                "give a smaller decay (or window=, in steps or as a fraction of the run), or warmup="
            )
        if self.stalled > LARGE:
            found.append(
                f"stalled: {self.stalled:.0%} of the entries that differ from the online weights would not move with "
                "the next absorption, as it is less than rounding leaves over: give compensated=True, a larger every= "
                "or a smaller decay"
            )
        for names, what in (
            (self.narrow, "kept in less than float32, where small steps are lost: accumulate in float32"),
            (self.nonfinite, "NaN or infinite in the average: reset() it, or load it from a checkpoint before that"),
            (self.untracked, "trainable but not averaged: what is trained now must be so when averaging starts"),
            (self.frozen, "averaged but frozen by now: frozen=True averages all parameters from the start"),
            (self.foreign, "averaged but not in the model: this is the average of another model"),
            (
                self.stale,
                "running statistics of the online weights: a trainer's callback recomputes them for the average; in "
                "your own loop recalibrate(model, batches) under it, or average them too with buffers=True",
            ),
        ):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                found.append(f"{names[0]!r}{more}: {what}")
        return found

    def __str__(self) -> str:
        head = (
            f"{self.name}: {self.absorbed} absorbed until step {self.step}, {self.distance:.2g} of their norm from the "
            f"online weights, {self.apart:.0%} of the entries apart"
        )
        return "\n".join([head, *(f"- {finding}" for finding in self.findings or ["nothing is the matter"])])


@torch.no_grad()
def diagnose(model: nn.Module, averager: Averager) -> Diagnosis:
    """Look for what makes an average useless without any error: it hardly moves, or it is not all there.

        print(diagnose(model, average))

    For the middle of training, while the model holds the online weights and is in training mode; the averager of a
    trainer's callback is ``callback.averager``. Costs a few passes over the weights, and the memory of one average.

    Args:
        model: the model, wrapped or not.
        averager: what averages it.

    Returns:
        The figures, and as `Diagnosis.findings` what is wrong with them:

        - an EMA that is mostly what it began with, or of which most entries would not move by one more absorption;
        - an average kept in less than float32; NaN or infinity in it;
        - parameters that are trained but not averaged, or averaged but frozen by now;
        - running statistics (BatchNorm's) of the online weights, with which the average would be evaluated.

    Raises:
        ValueError: an averager that keeps no average, such as `Trajectory`.
    """
    if not averager.views():
        raise ValueError(f"{averager.name!r} keeps no average of the weights that could be diagnosed")
    own = dict(every_name(model))
    tracked = {name: torch.Size(shape) for name, (shape, _) in averager.numbers()["layout"].items()}
    foreign = [name for name, shape in tracked.items() if name not in own or own[name].shape != shape]
    known = [name for name in tracked if name not in foreign]
    covered = {id(own[name]) for name in known}
    trained: dict[int, str] = {}
    for name, tensor in own.items():
        if tensor.requires_grad:
            trained.setdefault(id(tensor), name)  # a tied weight counts once, under its first name

    average = averager.average() if averager.ready else {}
    rounded = averager.average(rounded=True) if averager.ready else {}
    squared = norm = 0.0
    apart = 0
    for name in known if averager.ready else ():
        difference, length, _ = kernels.gap(average[name], own[name])
        squared, norm = squared + difference, norm + length
        apart += kernels.gap(rounded[name], own[name])[2]
    stalled, first = _inertia(averager, own, known) if isinstance(averager, EMA) and averager.ready else (0.0, 0.0)
    return Diagnosis(
        name=averager.name,
        step=averager.step,
        absorbed=averager.absorbed,
        distance=math.sqrt(squared / norm) if norm else 0.0,
        apart=apart / max(1, sum(own[name].numel() for name in known)),
        stalled=stalled,
        first=first,
        narrow=tuple(n for n, tensor in average.items() if kernels.accumulator_dtype(tensor.dtype) is not tensor.dtype),
        nonfinite=tuple(name for name, tensor in average.items() if not tensor.isfinite().all()),
        untracked=tuple(name for key, name in trained.items() if key not in covered) if tracked else (),
        frozen=tuple(n for n in known if id(own[n]) not in trained and isinstance(own[n], nn.Parameter))
        if not averager.frozen
        else (),
        foreign=tuple(foreign),
        stale=tuple(name for name in _running_statistics(model) if name not in tracked),
    )


def _inertia(ema: EMA, own: Weights, known: Iterable[str]) -> tuple[float, float]:
    """The share of entries that the next absorption would not move, and that of the first weights in the average."""
    weight = 1 - ema.kept(ema.absorbed_step, ema.absorbed_step + ema.spacing())
    counts = [kernels.unmoved(ema.tensors()["ema"][name], own[name], weight) for name in known]
    stalled = sum(unmoved for unmoved, _ in counts) / max(1, sum(apart for _, apart in counts))
    return stalled, ema.kept(ema.first_step, ema.absorbed_step) if ema.absorbed > 1 else 0.0


def _running_statistics(model: nn.Module) -> Iterator[str]:
    """Names of the statistics that BatchNorm layers collect in training: frozen layers collect none."""
    names = {id(tensor): name for name, tensor in every_name(model)}
    for layer in batchnorm_layers(model):
        if layer.training or not model.training:
            yield from (names[id(layer.get_buffer(name))] for name in ("running_mean", "running_var"))
