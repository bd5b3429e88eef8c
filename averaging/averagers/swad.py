"""SWAD: the mean of the weights after every step along a valley of the validation loss.

    average = (θ_{t_s} + … + θ_{t_e}) / (t_e − t_s + 1)
    t_s: the first evaluation whose loss the next N_s − 1 do not undercut;   l = r · mean of these N_s losses
    t_e: the last evaluation before the losses stay above l for N_e in a row

Cha et al. 2021, "SWAD: Domain Generalization by Seeking Flat Minima" (arXiv:2102.08604), algorithm 1. As in the
authors' code (khanrc/swad), weights are averaged in segments, each the steps up to an evaluation since the one before,
and a segment goes with the loss measured at its end: the average is over whole segments, from that of t_s to that of
t_e.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from averaging import kernels
from averaging.averager import Averager
from averaging.schedule import Span

if TYPE_CHECKING:
    from torch import Tensor

    from averaging.weights import Weights

# What the trainers' callbacks call the loss of the online weights; the usual names are theirs with evaluate="online".
METRICS = ("eval_online_loss", "online_val_loss", "val_loss", "eval_loss")


@dataclass
class Segment:
    """The mean of ``count`` weights in a row, and the loss measured with the last of them."""

    mean: dict[str, Tensor]
    count: int = 1
    loss: float = math.nan

    def extend(self, weights: Weights, count: int = 1) -> None:
        """Take in ``weights``, themselves the mean of ``count`` weights."""
        self.count += count
        kernels.lerp_(self.mean, weights, count / self.count)


class SWAD(Averager):
    """The mean of the weights after every step, from a start to an end that the validation loss chooses.

    It watches the loss of the weights being trained, not that of the average: the trainers' callbacks need
    ``evaluate="both"`` (which is the default of ``SWAD``'s own) or ``"online"``; in your own loop call
    ``average.observe({"val_loss": loss}, step)`` after each evaluation.

    Until the start t_s is found, at the earliest ``optimum_patience`` evaluations into training, the average stands for
    the model's own weights. Afterwards it reaches to the latest evaluation that was not above the tolerance l. Once the
    end is found (`ended`), nothing is absorbed any more: training may as well stop.

    A checkpoint written at a step that is evaluated, but before it is, does not know the loss, and Lightning does not
    evaluate again when it resumes: save after validation, not with ``ModelCheckpoint(every_n_train_steps=...)``.

    Costs at most ``optimum_patience`` float32 copies of the weights until t_s is found, two until t_e is, and then one,
    where the weights are; an absorption is one pass over the weights and the open segment, in place.

    Args:
        optimum_patience: N_s, evaluations.
        overfit_patience: N_e, evaluations.
        tolerance: r, at least 1: 1.3, or 1.2 where the loss is steep. (Where a loss is negative, l is as far above the
            mean as r would put it for a positive one.)
        metric: the name of the loss; by default what the callbacks call that of the online weights, or ``"val_loss"``.
            In several processes the trainers' callbacks go by what the first one logs (in Lightning its own validation
            data's loss, unless logged with ``sync_dist=True``); in your own loop observe the same number in all.
        every: optimizer steps between absorptions, 1 by default.
        start, name, frozen, buffers: as in `Averager`.

    Raises:
        ValueError: a patience below 1 or a tolerance below 1; and from `observe`, evaluations that do not measure
            ``metric``.
    """

    def __init__(
        self,
        optimum_patience: int = 3,
        overfit_patience: int = 6,
        *,
        tolerance: float = 1.3,
        metric: str | None = None,
        every: Span | None = None,
        start: Span = 0,
        name: str | None = None,
        frozen: bool = False,
        buffers: bool = False,
    ) -> None:
        for what, patience in (("optimum_patience", optimum_patience), ("overfit_patience", overfit_patience)):
            if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
                raise ValueError(f"{what}={patience!r}: give a number of evaluations, at least 1")
        if not 1 <= tolerance < math.inf:
            raise ValueError(f"tolerance={tolerance!r}: must be at least 1")
        self.optimum_patience = optimum_patience
        self.overfit_patience = overfit_patience
        self.tolerance = tolerance
        self.metric = metric
        self.limit: float | None = None
        """l, the loss above which the valley has been left; None until the start is found."""
        self.ended = False
        """Whether the end has been found."""
        # The segments since the best evaluation; once the start is found one, which is the average.
        self._segments: list[Segment] = []
        # Since then, or since the last evaluation that was not above the limit.
        self._open: Segment | None = None
        self._above = 0
        self._missed: int | None = None
        super().__init__(every=every, start=start, name=name, frozen=frozen, buffers=buffers)

    def describe(self, weights: Weights) -> str:
        count = max(2, self.optimum_patience)
        return f"mean along a valley of the validation loss; up to {count} × {self._cost(weights)}"

    def first_average(self, after: int = 0) -> int | None:
        return None  # when the validation loss says so

    @property
    def ready(self) -> bool:
        return self.limit is not None

    def absorb(self, weights: Weights, step: int) -> None:
        if self.ended:
            return
        if self._open is None:
            self._open = Segment(kernels.accumulators(weights))
        else:
            self._open.extend(weights)

    def observe(self, metrics: Mapping[str, float], step: int) -> None:
        loss = self._loss(metrics, step)
        if loss is None or self._open is None:
            return
        self._open.loss = loss
        if self.limit is None:
            self._seek_start()
        else:
            self._judge(loss)
            if self._above >= self.overfit_patience:
                self.ended, self._open = True, None

    def _loss(self, metrics: Mapping[str, float], step: int) -> float | None:
        names = METRICS if self.metric is None else (self.metric,)
        for name in names:
            if name in metrics:
                self._missed = -1
                return metrics[name] if math.isfinite(metrics[name]) else math.inf
        if self._missed is None:
            self._missed = step
        if 0 <= self._missed < step:
            raise ValueError(
                f"{self.name} is chosen by the validation loss of the online weights, {' or '.join(map(repr, names))}, "
                f"but the evaluations at steps {self._missed} and {step} measured only {', '.join(metrics)}: "
                'give its name as metric=, and the callback evaluate="both"'
            )
        return None

    def _seek_start(self) -> None:
        assert self._open is not None
        loss = self._open.loss
        if loss == math.inf or (self._segments and loss < self._segments[0].loss):
            self._segments = []
        self._segments.append(self._open)
        self._open = None
        if len(self._segments) < self.optimum_patience or loss == math.inf:
            return
        segments, self._segments = self._segments, []
        mean = fmean(segment.loss for segment in segments)
        self.limit = mean + (self.tolerance - 1) * abs(mean)
        for segment in segments:
            if self._open is None:
                self._open = segment
            else:
                self._open.extend(segment.mean, segment.count)
            self._judge(segment.loss)

    def _judge(self, loss: float) -> None:
        """Take the open segment into the average if it ended with a ``loss`` that is not above the limit."""
        assert self.limit is not None
        assert self._open is not None
        if loss > self.limit:
            self._above += 1
            return
        if self._segments:
            self._segments[0].extend(self._open.mean, self._open.count)
        else:
            self._segments = [self._open]
        self._open = None
        self._above = 0

    def average(self, *, rounded: bool = False) -> Weights:
        self._require_average()
        return self._wide_or_rounded(self._segments[0].mean, rounded)

    def tensors(self) -> Mapping[str, Weights]:
        groups = {f"segment-{i}": segment.mean for i, segment in enumerate(self._segments)}
        return {**groups, "open": self._open.mean} if self._open else groups

    def numbers(self) -> dict[str, Any]:
        return {
            **super().numbers(),
            "segments": [[segment.count, segment.loss] for segment in self._segments],
            "open": self._open.count if self._open else 0,
            "limit": self.limit,
            "above": self._above,
            "ended": self.ended,
        }

    def restore(self, tensors: Mapping[str, Weights], numbers: Mapping[str, Any]) -> None:
        self._segments = [
            Segment(kernels.accumulators(tensors[f"segment-{i}"]), count, loss)
            for i, (count, loss) in enumerate(numbers.get("segments", []))
        ]
        self._open = Segment(kernels.accumulators(tensors["open"]), numbers["open"]) if "open" in tensors else None
        self.limit = numbers.get("limit")
        self._above = numbers.get("above", 0)
        self.ended = numbers.get("ended", False)
        self._missed = None
