"""Trajectory: sparse snapshots of the weights along training, to choose any average from afterwards.

Nothing is averaged while training. Which window, spacing or decay is best is decided when the run is over, with the
command `soup` or `averaging.soups`, from one run instead of one run per setting: Sanyal et al. 2023
(arXiv:2306.03241) and Ajroldi, Orvieto and Geiping 2025 (arXiv:2502.06761) for how much depends on the choice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from averaging import kernels
from averaging.averager import Averager
from averaging.schedule import Length, Run, Span
from averaging.text import size
from averaging.trail import Trail

if TYPE_CHECKING:
    from averaging.averager import Average
    from averaging.weights import Weights

DTYPES = ("bfloat16", "float16", "float32")


class Trajectory(Averager):
    """Stores a snapshot of the weights from time to time, as a safetensors file that stays.

        Trajectory("runs/trajectory", every=100)
        $ soup runs/trajectory --last 10 --every 2

    It leads nothing: `average` is empty, so evaluations measure the online weights, and the model keeps its trained
    weights when training ends. A run that is resumed goes on with its snapshots; those of later steps, and those of a
    run that was there before, are moved to ``superseded-<n>/`` below the folder.

    Costs no memory, and one copy of the averaged weights on disk per snapshot. A disk without room is an `OSError`
    from `update` that leaves the earlier snapshots, and training, as they were.

    Args:
        folder: where the snapshots go. With `averaging.transformers`, ``template/`` in it holds the model as it was
            saved at the start, with configuration and tokenizer, so that soups open with ``from_pretrained``.
        every: spacing of the snapshots: optimizer steps, ``"epoch"``, or a fraction of the run. The default is 1 % of
            the run, and needs the run's length.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"`` to store the snapshots in; by default they are verbatim.
        start, name, frozen, buffers: as in `Averager`.

    Raises:
        ValueError: another dtype.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every: Span | None = None,
        dtype: str | None = None,
        start: Span = 0,
        name: str | None = None,
        frozen: bool = False,
        buffers: bool = False,
    ) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: give one of {', '.join(map(repr, DTYPES))}, or None for no change")
        self.dtype: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
        self.trail = Trail(Path(folder))
        super().__init__(every=every, start=start, name=name, frozen=frozen, buffers=buffers)

    def describe(self, weights: Weights) -> str:
        count = sum(tensor.numel() * (self.dtype or tensor.dtype).itemsize for tensor in weights.values())
        return f"snapshots of {size(count)} in {self.trail.folder}"

    def default_every(self, run: Run) -> Length:
        return Length(0.01, "run")

    def keep_template(self, save: Callable[[Path], None]) -> None:
        self.trail.keep_template(save, together=bool(self._shards))

    def absorb(self, weights: Weights, step: int) -> None:
        self.trail.set_aside(after=self.absorbed_step)
        if (dtype := self.dtype) is not None:
            weights = {n: t if t.is_complex() else kernels.rounded(t, dtype) for n, t in weights.items()}
        self.trail.store(step, weights, shards=self._shards)

    def average(self, *, rounded: bool = False) -> Weights:
        self._require_average()
        return {}

    def views(self) -> Mapping[str, Average]:
        return {}

    def tensors(self) -> Mapping[str, Weights]:
        return {}

    def restore(self, tensors: Mapping[str, Weights], numbers: Mapping[str, Any]) -> None:
        pass
