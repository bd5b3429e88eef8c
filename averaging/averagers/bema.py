"""BEMA: the exponential moving average with its lag corrected.

    EMA_t = (1 − β_t) EMA_{t−1} + β_t θ_t,   β_t = (ρ + γt)^−κ
    θ'_t = EMA_t + α_t (θ_t − θ_0),          α_t = (ρ + γt)^−η

with θ_0 = EMA_0 the weights when averaging starts. Block and Zhang 2025, "EMA Without the Lag: Bias-Corrected Iterate
Averaging Schemes" (arXiv:2508.00180), algorithm 1. trl's BEMACallback calls κ `ema_power`, η `bias_power`, ρ `lag`,
γ `multiplier`, and the spacing and the start `update_freq` and `update_after`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from averaging import kernels
from averaging.averager import Averager
from averaging.memory import memory as open_memory
from averaging.schedule import Length, Run, Schedule, Span

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from torch import Tensor

    from averaging.weights import Weights

START = "start"


class BEMA(Averager):
    """The bias-corrected exponential moving average of the weights.

    θ_0 is the first weights offered from ``start`` on. The trainers' callbacks offer the weights before the first
    step, too; in your own loop call ``update(model, 0)`` before it, so that θ_0 is where training began. The average
    begins with the absorption after that, and until then stands for the model's own weights.

    Costs one float32 copy of the weights where they are, the EMA, and in ``memory`` two copies in their own dtype: θ_0
    and the θ_t last absorbed; so only the EMA where ``memory`` is a folder. θ'_t is computed when it is read, in
    float64, and rounded once. An absorption is one pass over the weights and the EMA, in place, and one copy of the
    weights. Saved states share the files of θ_0 and θ_t: each is written once.

    Args:
        kappa: κ, the power of the EMA's decay: larger averages longer.
        eta: η, the power of the correction's decay: larger corrects less; 0 adds all of θ_t − θ_0 for ever.
        rho: ρ, how many steps older than it is the average behaves.
        gamma: γ, the weight of a step in β_t and α_t, which count optimizer steps of the run.
        every: optimizer steps between absorptions, 400 by default. β_t is per absorption.
        memory: where θ_0 and θ_t are kept: ``"cpu"``, ``"pinned"``, ``"device"`` (with the weights), or a folder, as in
            `LAWA`.
        start, name, frozen, buffers: as in `Averager`.

    Raises:
        ValueError: kappa, eta or gamma negative, or rho below 1.
    """

    def __init__(
        self,
        kappa: float = 0.5,
        eta: float = 0.2,
        *,
        rho: float = 10.0,
        gamma: float = 1.0,
        every: Span | None = None,
        start: Span = 0,
        memory: str | os.PathLike[str] = "cpu",
        name: str | None = None,
        frozen: bool = False,
        buffers: bool = False,
    ) -> None:
        for what, value in (("kappa", kappa), ("eta", eta), ("gamma", gamma)):
            if not value >= 0:
                raise ValueError(f"{what}={value!r}: must not be negative")
        if not rho >= 1:
            raise ValueError(f"rho={rho!r}: must be at least 1, or the first weights would count more than once")
        self.kappa = kappa
        self.eta = eta
        self.rho = rho
        self.gamma = gamma
        self._ema: dict[str, Tensor] = {}
        self._memory = open_memory(memory)
        self._latest: str | None = None
        super().__init__(every=every, start=start, name=name, frozen=frozen, buffers=buffers)

    def default_every(self, run: Run) -> Length:
        return Length(400, "steps")

    def due(self, last: tuple[int, float], now: tuple[int, float | None]) -> bool:
        if not self.absorbed:
            assert self._schedule is not None
            return self._schedule.started(self.run, now)
        return super().due(last, now)

    def first_average(self, after: int = 0) -> int | None:
        if not self.absorbed and self.start.amount:  # the weights at the start are absorbed first
            begun = next(Schedule(Length(1, "steps"), self.start).steps(self.run, after), None)
            if begun is None:
                return None
            after = begun
        return super().first_average(after)

    def describe(self, weights: Weights) -> str:
        return f"EMA with its lag corrected; {self._cost(weights)}, and 2 × {self._memory.cost(weights)}"

    def shortage(self, weights: Weights) -> str | None:
        return self._memory.shortage(weights, 2)

    @property
    def ready(self) -> bool:
        return self._latest is not None

    def absorb(self, weights: Weights, step: int) -> None:
        if not self.absorbed:
            self._ema = kernels.accumulators(weights)
            self._memory.store(START, weights)
            return
        kernels.lerp_(self._ema, weights, self._power(self.kappa, step))
        latest = f"latest-{step:012d}"
        self._memory.store(latest, weights, recycle=self._latest)
        self._latest = latest

    def _power(self, power: float, step: int) -> float:
        return float((self.rho + self.gamma * step) ** -power)

    def average(self, *, rounded: bool = False) -> Weights:
        self._require_average()
        assert self._latest is not None
        alpha = self._power(self.eta, self.absorbed_step)
        start, latest = self._memory[START], self._memory[self._latest]
        average = {
            name: torch.empty(ema.shape, dtype=self._average_dtype(name, rounded), device=ema.device)
            for name, ema in self._ema.items()
        }
        groups = (([ema, latest[name], start[name]], average[name]) for name, ema in self._ema.items())
        kernels.combine(groups, [1.0, alpha, -alpha])
        return average

    def tensors(self) -> Mapping[str, Weights]:
        groups: dict[str, Weights] = {"ema": self._ema} if self._ema else {}
        for key in (START, self._latest) if groups else ():
            if key:
                groups[key] = self._memory[key]
        return groups

    def immutable(self, group: str) -> bool:
        return group != "ema"

    def write_group(self, group: str, file: Path) -> None:
        if group == "ema":
            super().write_group(group, file)
        else:
            self._memory.save(group, file)

    def restore(self, tensors: Mapping[str, Weights], numbers: Mapping[str, Any]) -> None:
        self._ema = kernels.accumulators(tensors.get("ema", {}))
        self._memory.restore({key: weights for key, weights in tensors.items() if key != "ema"})
        self._latest = next((key for key in tensors if key.startswith("latest-")), None)
