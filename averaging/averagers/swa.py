"""SWA: the running mean of the weights along the last part of training.

    w̄ ← w̄ + (θ − w̄) / (n + 1),   n snapshots absorbed so far

Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization" (arXiv:1803.05407),
algorithm 1: one snapshot per epoch (or cycle), from about three quarters of the training budget on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from averaging import kernels
from averaging.averager import Averager
from averaging.schedule import Length, Run, Span

if TYPE_CHECKING:
    from torch import Tensor

    from averaging.weights import Weights


class SWA(Averager):
    """The equal-weight running mean of all snapshots since ``start``, in float32 or better on the weights' device.

    Costs one float32 copy of the weights; an absorption is one pass over the weights and the mean, in place.

    Args:
        start: first point of training at which to absorb: an optimizer step, or a fraction of the run.
            The default is 0.75, three quarters of the run.
        every: spacing of the snapshots: ``"epoch"`` (the default, as in the paper), or optimizer steps.
        name, frozen, buffers: as in `Averager`.
    """

    def __init__(
        self,
        start: Span = 0.75,
        *,
        every: Span | None = None,
        name: str | None = None,
        frozen: bool = False,
        buffers: bool = False,
    ) -> None:
        self._mean: dict[str, Tensor] = {}
        super().__init__(every=every, start=start, name=name, frozen=frozen, buffers=buffers)

    def describe(self, weights: Weights) -> str:
        return f"running mean of the snapshots; {self._cost(weights)}"

    def default_every(self, run: Run) -> Length:
        return Length(1, "epochs")

    def absorb(self, weights: Weights, step: int) -> None:
        if not self.absorbed:
            self._mean = kernels.accumulators(weights)
        else:
            kernels.lerp_(self._mean, weights, 1 / (self.absorbed + 1))

    def average(self, *, rounded: bool = False) -> Weights:
        return self._wide_or_rounded(self._mean, rounded)

    def tensors(self) -> Mapping[str, Weights]:
        return {"mean": self._mean} if self._mean else {}

    def restore(self, tensors: Mapping[str, Weights], numbers: Mapping[str, Any]) -> None:
        self._mean = kernels.accumulators(tensors.get("mean", {}))
