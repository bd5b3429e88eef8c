"""Post-hoc EMA: two power-function averages stored now and then, from which any width can be rebuilt afterwards.

    e_t = β(t) e_{t−Δ} + (1 − β(t)) θ_t,   β(t) = (1 − Δ/t)^(γ+1)

with Δ the optimizer steps since the last absorption. The weight of θ_τ in e_t is (γ+1) τ^γ / t^(γ+1): a profile whose
width grows with training. It is named by its standard deviation relative to t,

    width = √((γ+1) / ((γ+2)² (γ+3)))

Karras et al. 2023, "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2, arXiv:2312.02696),
section 3 and appendix C. `averaging.soups.post_hoc` does the rebuilding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from averaging import kernels
from averaging.averager import Averager
from averaging.checkpoints.finding import WIDTH_KEY
from averaging.schedule import Length, Run, Schedule, Span
from averaging.soups.post_hoc import exponent
from averaging.trail import Trail

if TYPE_CHECKING:
    from torch import Tensor

    from averaging.weights import Weights


class PostHocEMA(Averager):
    """Power-function EMAs, in float32 or better on the weights' device, with snapshots of them in a folder.

    While training the average is the first of them. Afterwards ``averaging.soups.post_hoc(folder, width=0.07)``, or
    ``soup folder --post-hoc 0.07``, gives the EMA of any width, at any step at which snapshots were stored.

    Costs one float32 copy of the weights per width, and as much on disk for each snapshot. A run that is resumed goes
    on with its snapshots; those of later steps, and those of a run that was there before, are moved to
    ``superseded-<n>/`` below the folder. A disk without room is an `OSError` from `update` that leaves the averages
    and the earlier snapshots as they were; training may go on.

    Args:
        folder: where the snapshots go, in a file per width and step. With `averaging.transformers`, ``template/`` in
            it holds the model as it was saved at the start, so that what is rebuilt opens with ``from_pretrained``.
        widths: standard deviations of the profiles relative to the training done, between 0 and 0.289. Two are enough;
            the widths wanted afterwards may lie between or around them.
        snapshots: spacing of the snapshots: optimizer steps, epochs, or a fraction of the run.
        every: optimizer steps between absorptions; the profiles are the same at any spacing. The default is 1/10 000
            of the run, or 1 where its length is not known: absorbing more often than that would only cost time, and
            float32 its precision.
        start, name, frozen, buffers: as in `Averager`.

    Raises:
        ValueError: a width out of range, or one given twice.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        widths: Sequence[float] = (0.05, 0.10),
        *,
        snapshots: Span = "1%",
        every: Span | None = None,
        start: Span = 0,
        name: str | None = None,
        frozen: bool = False,
        buffers: bool = False,
    ) -> None:
        self.exponents = {float(width): exponent(width) for width in widths}
        if not self.exponents or len(self.exponents) != len(widths):
            raise ValueError(f"widths={widths!r}: give one or more different widths, such as (0.05, 0.10)")
        self.snapshots = Length.parse(snapshots, "snapshots")
        if not self.snapshots.amount:
            raise ValueError(f"snapshots={snapshots!r}: must be positive")
        self.trail = Trail(Path(folder), labels="-width-.+")
        self._tracks: dict[float, dict[str, Tensor]] = {}
        self._stored_step = 0
        super().__init__(every=every, start=start, name=name, frozen=frozen, buffers=buffers)

    def keep_template(self, save: Callable[[Path], None]) -> None:
        self.trail.keep_template(save, together=bool(self._shards))

    def describe(self, weights: Weights) -> str:
        widths = ", ".join(f"{width:g}" for width in self.exponents)
        tracks = f"power-function EMAs of widths {widths}; {len(self.exponents)} × {self._cost(weights)}"
        return f"{tracks}, as much in {self.trail.folder} every {self.snapshots.text(self.run)}"

    def default_every(self, run: Run) -> Length:
        return Length(max(1, (run.steps or 0) // 10_000), "steps")

    def _resolve(self) -> Schedule:
        if self.snapshots.unit != "epochs":
            self.snapshots.in_steps(self.run, "snapshots")  # fail before training if it cannot be resolved
        return super()._resolve()

    def update(
        self, model: nn.Module | Weights, step: int | None = None, *, epoch: float | None = None
    ) -> Weights | None:
        last = (self.step, self.epoch)
        super().update(model, step, epoch=epoch)
        due = Schedule(self.snapshots, self.start).due(self.run, last, (self.step, epoch))
        if due and self.absorbed and self.absorbed_step != self._stored_step:
            self._store()
        return None

    def _store(self) -> None:
        self.trail.set_aside(after=self._stored_step)
        for width, track in self._tracks.items():
            self.trail.store(self.absorbed_step, track, f"-width-{width:g}", {WIDTH_KEY: repr(width)}, self._shards)
        self._stored_step = self.absorbed_step

    def absorb(self, weights: Weights, step: int) -> None:
        if not self.absorbed:
            self._tracks = {width: kernels.accumulators(weights) for width in self.exponents}
            return
        for width, gamma in self.exponents.items():
            kernels.lerp_(self._tracks[width], weights, 1 - (self.absorbed_step / step) ** (gamma + 1))

    def average(self, *, rounded: bool = False) -> Weights:
        return self._wide_or_rounded(next(iter(self._tracks.values()), {}), rounded)

    def tensors(self) -> Mapping[str, Weights]:
        return {f"width-{width:g}": track for width, track in self._tracks.items()}

    def numbers(self) -> dict[str, Any]:
        return {**super().numbers(), "stored_step": self._stored_step}

    def restore(self, tensors: Mapping[str, Weights], numbers: Mapping[str, Any]) -> None:
        groups = {f"width-{width:g}": width for width in self.exponents}
        if tensors and tensors.keys() != groups.keys():
            raise ValueError(f"the state is of {', '.join(tensors)}, not of {', '.join(groups)}: give the same widths")
        self._tracks = {width: kernels.accumulators(tensors[group]) for group, width in groups.items() if tensors}
        self._stored_step = int(numbers.get("stored_step", 0))
