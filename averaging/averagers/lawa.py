"""LAWA: the uniform mean of the latest k snapshots, first in, first out.

    average = (θ_{t₁} + … + θ_{t_k}) / k,   t₁ < … < t_k the last k absorptions

Kaddour 2022, "Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging"
(arXiv:2209.14981); Sanyal et al. 2023, "Early Weight Averaging meets High Learning Rates for LLM Pre-training"
(arXiv:2306.03241). The default window, 1 % of the run, is the one found best throughout by
Ajroldi, Orvieto and Geiping 2025, "When, Where and Why to Average Weights?" (arXiv:2502.06761). Other weights than
1/k, which stand in for a decay of the learning rate: `averaging.decay` (arXiv:2507.17634).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from averaging import kernels
from averaging.averager import Averager
from averaging.decay import Decay, check_decay, decay_weights
from averaging.memory import memory as open_memory
from averaging.schedule import Length, Run, Span

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from averaging.averager import Average
    from averaging.weights import Weights


class LAWA(Averager):
    """The mean of the latest ``k`` snapshots, kept verbatim and averaged only when read.

    The mean is exact: each entry is the float64 mean of the snapshots, rounded once. It is cached until the next
    absorption. Until ``k`` snapshots have been absorbed it is the mean of those there are.

    Costs ``k`` copies of the weights in ``memory`` (of several, the largest), plus one while an average is in use; an
    absorption is one copy of the weights. Saved states share the files of the snapshots, so that each is written once.

    Args:
        k: snapshots averaged, at least 1. Several numbers make an average of each, ``(5, 10, 20)`` those named
            ``lawa-5``, ``lawa-10`` and ``lawa-20``, all from one ring of as many snapshots as the largest needs: see
            `views`. The first one leads, and is what ``window`` and `average` are about.
        every: optimizer steps between snapshots (or ``"epoch"``, or a fraction of the run).
        window: instead of ``every``, the length of training that the ``k`` snapshots span together. The default
            is 1 % of the run, so that ``every`` is 1 % of the run divided by ``k``; it needs the run's length,
            which the trainers' callbacks know and `prepare` tells.
        weights: ``"linear"``, the plain mean; or ``"cosine"`` or ``"inverse_sqrt"``, a weighted one that stands in
            for such a decay of a constant learning rate over the window.
        memory: where snapshots live: ``"cpu"``; ``"pinned"``, CPU memory that CUDA weights reach while training goes
            on, for a copy of the weights on the device until they have arrived (torch rounds each page-locked tensor
            up to a power of two bytes); ``"device"`` (with the weights); or a folder, in which each is a safetensors
            file and the mean streams tensor by tensor. A folder without room is an `OSError` from `update` that
            leaves the earlier snapshots, and training, as they were.
        start, name, frozen, buffers: as in `Averager`.

    Raises:
        ValueError: k < 1 or twice the same, unknown weights, or both ``every`` and ``window``.
    """

    def __init__(
        self,
        k: int | Sequence[int] = 5,
        *,
        every: Span | None = None,
        window: Span | None = None,
        weights: Decay = "linear",
        start: Span = 0,
        memory: str | os.PathLike[str] = "cpu",
        name: str | None = None,
        frozen: bool = False,
        buffers: bool = False,
    ) -> None:
        self._several = isinstance(k, Sequence)
        self.windows = tuple(k) if isinstance(k, Sequence) else (k,)
        for length in self.windows:
            if isinstance(length, bool) or not isinstance(length, int) or length < 1:
                raise ValueError(f"k={k!r}: LAWA averages a whole number of snapshots, at least 1")
        if not self.windows or len(set(self.windows)) < len(self.windows):
            raise ValueError(f"k={k!r}: give one number of snapshots, or several different ones")
        if every is not None and window is not None:
            raise ValueError("give either every (the spacing of the snapshots) or window (k times that), not both")
        check_decay(weights)
        self.k = self.windows[0]
        self.weights = weights
        self.window = Length.parse("1%" if window is None else window, "window")
        self._memory = open_memory(memory)
        self._keys: list[str] = []
        self._cache: dict[tuple[int, bool], Weights] = {}
        super().__init__(every=every, start=start, name=name, frozen=frozen, buffers=buffers)

    def default_every(self, run: Run) -> Length:
        try:
            steps = self.window.in_steps(run, "window")
        except ValueError as error:
            raise ValueError(
                f"LAWA(k={self.k}) spaces its snapshots over 1 % of the run unless told otherwise, and the run's "
                "length is not known: give every=<optimizer steps between snapshots>, or call prepare(total_steps=...)"
            ) from error
        return Length(max(1, round(steps / self.k)), "steps")

    def describe(self, weights: Weights) -> str:
        windows = " and ".join(map(str, self.windows))
        return f"mean of the latest {windows} snapshots; {max(self.windows)} × {self._memory.cost(weights)}"

    def shortage(self, weights: Weights) -> str | None:
        return self._memory.shortage(weights, max(self.windows))

    def problem(self) -> str | None:
        if (problem := super().problem()) is not None or self.run.steps is None:
            return problem
        longest = max(self.windows)
        steps = [*islice(self._due_steps(), longest)]
        if not steps or steps[-1] <= self.run.steps:
            return None
        return (
            f"the window of {longest} snapshots would be full after {steps[-1]} optimizer steps but the run ends after "
            f"{self.run.steps}: give a smaller k, every= or window="
        )

    def absorb(self, weights: Weights, step: int) -> None:
        key = f"snapshot-{step:012d}"
        oldest = self._keys[0] if len(self._keys) == max(self.windows) else None
        self._memory.store(key, weights, recycle=oldest)
        self._keys = [*(self._keys[1:] if oldest else self._keys), key]
        self._cache.clear()

    def average(self, *, rounded: bool = False) -> Weights:
        return self.mean(self.k, rounded=rounded)

    def mean(self, k: int, *, rounded: bool = False) -> Weights:
        """The mean of the latest ``k`` snapshots; `average` is that of the first window."""
        self._require_average()
        assert self._layout is not None
        if (k, rounded) not in self._cache:
            snapshots = [self._memory[key] for key in self._keys[-k:]]
            coefficients = None if self.weights == "linear" else decay_weights(self.weights, len(snapshots))
            divisor = len(snapshots) if coefficients is None else math.fsum(coefficients)
            groups = {}
            for name in self._layout:
                tensors = [snapshot[name] for snapshot in snapshots]
                dtype = self._average_dtype(name, rounded)
                groups[name] = (tensors, torch.empty(tensors[0].shape, dtype=dtype, device=tensors[0].device))
            kernels.combine(groups.values(), coefficients, divisor)
            average = {name: out for name, (_, out) in groups.items()}
            self._cache = {(k, rounded): average}
        return self._cache[k, rounded]

    def views(self) -> Mapping[str, Average]:
        if not self._several:
            return super().views()
        return {f"{self.name}-{k}": Window(self, k) for k in self.windows}

    def tensors(self) -> Mapping[str, Weights]:
        return {key: self._memory[key] for key in self._keys}

    def immutable(self, group: str) -> bool:
        return True

    def write_group(self, group: str, file: Path) -> None:
        self._memory.save(group, file)

    def restore(self, tensors: Mapping[str, Weights], numbers: Mapping[str, Any]) -> None:
        keys = sorted(tensors)[-max(self.windows) :]
        self._memory.restore({key: tensors[key] for key in keys})
        self._keys = keys
        self._cache.clear()


class Window:
    """The mean of the latest ``k`` snapshots of a `LAWA` that keeps more."""

    def __init__(self, ring: LAWA, k: int) -> None:
        self._ring = ring
        self._k = k

    @property
    def ready(self) -> bool:
        return self._ring.ready

    def average(self, *, rounded: bool = False) -> Weights:
        return self._ring.mean(self._k, rounded=rounded)
