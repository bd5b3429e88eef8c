"""SWA's learning rate: annealed to a constant from SWA's start on, or cyclic.

    annealed:  lr = α swa_lr + (1 − α) lr₀,    α = (1 − cos(π t))/2  or  α = t,    t = min(1, steps since the start / T)
    cyclic:    lr = (1 − t) max_lr + t swa_lr,    t = (n mod c + 1)/c    in the step after optimizer step n

lr₀ is the learning rate at SWA's start. The annealing is that of PyTorch's `SWALR`; the cycle of c steps is that of
Izmailov et al. 2018 (arXiv:1803.05407), section 3.1, with α₁ = max_lr and α₂ = swa_lr: a snapshot at the end of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from averaging.schedule import Length, Run, Span

if TYPE_CHECKING:
    from averaging.averager import Averager

AnnealStrategy = Literal["cos", "linear"]
Rates = float | Sequence[float]
"""A learning rate for all parameter groups, or one for each."""

BEFORE = "lr_before_swa"
"""Where a parameter group keeps lr₀, so that a resumed optimizer brings it along."""


class SWALearningRate:
    """Sets an optimizer's learning rate during SWA, whatever another scheduler has set it to.

    Args:
        swa_lr: the learning rate to anneal to, or that each cycle ends with.
        anneal: length of the annealing; 0 for none.
        anneal_strategy: ``"cos"`` or ``"linear"``.
        cycle: length of a cycle. Cycles are counted from the beginning of training, so that they end where a snapshot
            is taken every so many steps or epochs.
        max_lr: the learning rate that a cycle falls from; that at SWA's start by default.

    Raises:
        ValueError: a negative learning rate, an unknown strategy, or options of the other form.
    """

    def __init__(
        self,
        swa_lr: Rates,
        *,
        anneal: Span = 0.05,
        anneal_strategy: AnnealStrategy = "cos",
        cycle: Span | None = None,
        max_lr: Rates | None = None,
    ) -> None:
        for name, rates in (("swa_lr", swa_lr), ("max_lr", max_lr)):
            for rate in rates if isinstance(rates, Sequence) else (0.0 if rates is None else rates,):
                if not rate >= 0:
                    raise ValueError(f"{name}={rates!r}: a learning rate cannot be negative")
        if anneal_strategy not in ("cos", "linear"):
            raise ValueError(f"anneal_strategy={anneal_strategy!r}: give 'cos' or 'linear'")
        self.swa_lr = swa_lr
        self.anneal = Length.parse(anneal, "anneal")
        self.anneal_strategy = anneal_strategy
        self.cycle = None if cycle is None else Length.parse(cycle, "cycle")
        if self.cycle is not None and not self.cycle.amount:
            raise ValueError(f"cycle={cycle!r}: must be positive")
        if self.cycle is None and max_lr is not None:
            raise ValueError("max_lr is where a cycle begins: give cycle=, too")
        self.max_lr = max_lr

    def apply(self, optimizers: Sequence[Any], step: int, average: Averager) -> list[float] | None:
        """Set the learning rate for the optimizer step that comes after ``step`` steps.

        Args:
            optimizers: their parameter groups, in order, are those that lists of learning rates are about.
            step: optimizer steps done.
            average: its ``start`` is where this begins, in the run it was prepared for.

        Returns:
            The learning rate of each parameter group; None before SWA's start, when they are left alone.

        Raises:
            ValueError: lists of learning rates of another length, a group without one, or a length that is not known.
        """
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        since = step - _start(average)
        if since < 0:
            for group in groups:
                group.pop(BEFORE, None)  # of an earlier run with the same optimizer
            return None
        rates = []
        for group, swa_lr, max_lr in zip(
            groups, _each(self.swa_lr, groups, "swa_lr"), _each(self.max_lr, groups, "max_lr"), strict=True
        ):
            if group.get("lr") is None:
                raise ValueError("swa_lr needs an optimizer with a learning rate: a parameter group has lr=None")
            before = group.setdefault(BEFORE, float(group["lr"]))
            if self.cycle is None:
                rates.append(self._annealed(before, swa_lr, since, average.run))
            else:
                length = max(1, round(self.cycle.in_steps(average.run, "cycle")))
                t = (step % length + 1) / length
                rates.append((1 - t) * (before if max_lr is None else max_lr) + t * swa_lr)
        for group, rate in zip(groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        return rates

    def _annealed(self, before: float, swa_lr: float, since: int, run: Run) -> float:
        length = self.anneal.in_steps(run, "anneal")
        t = min(1.0, since / length) if length else 1.0
        alpha = (1 - math.cos(math.pi * t)) / 2 if self.anneal_strategy == "cos" else t
        return alpha * swa_lr + (1 - alpha) * before


def _start(average: Averager) -> int:
    """The optimizer steps done when the schedule lets the first snapshot be taken."""
    if not average.start.amount:
        return 0
    steps = average.start.in_steps(average.run, "start")
    return math.ceil(steps - 1e-6) if average.start.unit == "epochs" else max(1, round(steps))


def _each(rates: Any, groups: list[Any], name: str) -> Sequence[Any]:
    if not isinstance(rates, Sequence):
        return [rates] * len(groups)
    if len(rates) != len(groups):
        raise ValueError(f"{name} is a list of {len(rates)}, but the optimizer has {len(groups)} parameter groups")
    return rates
