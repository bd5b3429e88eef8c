"""EMA: the exponential moving average of the weights.

    e ← β e + (1 − β) θ

with β to the power of the optimizer steps since the last absorption, so that the half-life in steps is what was
asked for at any spacing. Polyak and Juditsky 1992 for averaging; Tarvainen and Valpola 2017 (arXiv:1703.01780)
for the exponential form in deep learning. Warm-ups: TensorFlow's ExponentialMovingAverage; diffusers' EMAModel and
timm's ModelEmaV3; Kingma and Ba 2015 (arXiv:1412.6980) section 3 for the debiasing; Karras et al. 2023
(arXiv:2312.02696, the EDM2 code) for the half-life ramp.

With ``switch``, training goes on from the average:

    θ ← e   at each multiple of switch

Li et al. 2024, "Switch EMA: A Free Lunch for Better Flatness and Sharpness" (arXiv:2402.09240): at the end of each
epoch. Lee et al. 2024, "Slow and Steady Wins the Race: Maintaining Plasticity with Hare and Tortoise Networks"
(arXiv:2406.02596): the hare, which trains, is set back every so many steps to the tortoise, its average.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from averaging import kernels
from averaging.averager import Averager
from averaging.schedule import Length, Run, Span

if TYPE_CHECKING:
    from torch import Tensor

    from averaging.weights import Weights

# Where a weight's dead zone in float32, 2^−24/(1 − βⁿ), reaches float16's rounding error, 2^−11.
STALL = 2.0**-13

Warmup = Literal["tensorflow", "power", "debias", "edm2"]


class EMA(Averager):
    """The exponential moving average, accumulated in float32 or better on the weights' device.

    The first absorption is a copy. Costs one float32 copy of the weights, or a float64 copy (twice as much) with
    ``compensated``; an absorption is one pass over the weights and the average, in place.

    Args:
        decay: β, per optimizer step, between 0 and 1.
        half_life: instead of ``decay``, the length of training after which a snapshot's weight has halved:
            β = 2^(−1/half_life).
        window: instead of ``decay``, the length of the uniform window with the same mean age:
            β = 1 − 2/(window + 1). The default is a window of 1 % of the run, and needs the run's length.
        every: optimizer steps between absorptions, 1 by default. The decay is per optimizer step all the same:
            an absorption after n steps uses βⁿ.
        warmup: how β grows at first, with t the optimizer steps since the first absorption:
            ``"tensorflow"``: min(β, (1+t)/(10+t));
            ``"power"``: min(β, 1 − (1+t)^−power);
            ``"debias"``: as a zero-initialised average divided by 1 − βᵗ, which makes the early average the
            plain weighted mean of what was absorbed;
            ``"edm2"``: a half-life of at most 0.09 t.
        power: the exponent of ``warmup="power"``: 2/3 for runs of a million steps, 3/4 for shorter ones.
        compensated: accumulate in float64, at 8 bytes per weight instead of 4, for decays of .9999 and beyond. In
            float32 an absorption that moves a weight by less than half the distance to the next float32 number does
            not move it at all: what is missing stays missing once it is below 2^−24/(1 − βⁿ) of the weight.
            A larger ``every`` helps too, at no cost. A warning says when either is called for.
        switch: copy the average into the model every so many optimizer steps, or ``"epoch"`` (or a fraction of the
            run), and train on from there. The trainers' callbacks do it; in your own loop `update` returns the weights
            to go on from. The average and the optimizer's moments stay as they are. Other averages named after this
            one absorb the weights it wrote.
        start, name, frozen, buffers: as in `Averager`. ``start`` holds for ``switch``, too.

    Raises:
        ValueError: decay outside [0, 1], more than one of decay, half_life and window, or ``compensated`` on a device
            without float64.
    """

    def __init__(
        self,
        decay: float | None = None,
        *,
        half_life: Span | None = None,
        window: Span | None = None,
        every: Span | None = None,
        start: Span = 0,
        warmup: Warmup | None = None,
        power: float = 2 / 3,
        compensated: bool = False,
        switch: Span | None = None,
        name: str | None = None,
        frozen: bool = False,
        buffers: bool = False,
    ) -> None:
        if sum(given is not None for given in (decay, half_life, window)) > 1:
            raise ValueError("give one of decay, half_life and window")
        if decay is not None and not 0 <= decay <= 1:
            raise ValueError(f"decay={decay!r}: must be between 0 (no averaging) and 1 (nothing new is absorbed)")
        if warmup not in (None, "tensorflow", "power", "debias", "edm2"):
            raise ValueError(f"warmup={warmup!r}: give 'tensorflow', 'power', 'debias', 'edm2' or None")
        if not power > 0:
            raise ValueError(f"power={power!r}: must be positive")
        self.decay = decay
        self.half_life = None if half_life is None else Length.parse(half_life, "half_life")
        if self.half_life and not self.half_life.amount:
            raise ValueError(f"half_life={half_life!r}: must be positive")
        self.window = Length.parse("1%" if window is None else window, "window")
        self.warmup = warmup
        self.power = power
        self.compensated = compensated
        self.write_backs = None if switch is None else Length.parse(switch, "switch")
        if self.write_backs and not self.write_backs.amount:
            raise ValueError(f"switch={switch!r}: must be positive")
        self._ema: dict[str, Tensor] = {}
        self.first_step = 0
        super().__init__(every=every, start=start, name=name, frozen=frozen, buffers=buffers)

    def decay_per_step(self, run: Run) -> float:
        """β after any warm-up, for a run of that length."""
        if self.decay is not None:
            return self.decay
        if self.half_life is not None:
            return float(2 ** (-1 / self.half_life.in_steps(run, "half_life")))
        try:
            window = self.window.in_steps(run, "window")
        except ValueError as error:
            raise ValueError(
                "EMA() averages over 1 % of the run unless told otherwise, and the run's length is not known: "
                "give decay= or half_life=, or call prepare(total_steps=...)"
            ) from error
        return max(0.0, 1 - 2 / (window + 1))

    def default_every(self, run: Run) -> Length:
        self.decay_per_step(run)  # fail before training if it cannot be resolved
        return Length(1, "steps")

    def describe(self, weights: Weights) -> str:
        beta = self.decay_per_step(self.run)
        return f"EMA with a decay of {beta:.8g} per step; {self._cost(weights, wide=self.compensated)}"

    def problem(self) -> str | None:
        if (problem := super().problem()) is not None or self.warmup is not None:
            return problem
        first, beta = self.first_average(), self.decay_per_step(self.run)
        if first is None or self.run.steps is None or (share := beta ** (self.run.steps - first)) <= 0.5:
            return None
        return (
            f"with a decay of {beta:.8g} per step, {share:.0%} of the average will still be the first weights absorbed "
            f"when the run ends after {self.run.steps} steps: give a smaller decay=, window= or half_life=, or warmup="
            '"debias"'
        )

    def kept(self, since: int, step: int) -> float:
        """The share that the average as it was at step ``since`` has in that of ``step``."""
        beta = self.decay_per_step(self.run)
        elapsed = step - since
        if self.warmup is None:
            return float(beta**elapsed)
        if self.warmup == "debias":
            # The weight still on the zeros that the average was initialised with.
            zeros = beta ** (since - self.first_step + self.spacing())
            return float(beta**elapsed * (1 - zeros) / (1 - beta**elapsed * zeros)) if zeros < 1 else 0.0
        ages = range(since - self.first_step + 1, step - self.first_step + 1)
        return math.prod(min(beta, self._warming(t)) for t in ages)

    def spacing(self) -> int:
        """Optimizer steps that the first absorption stands for: as many as every other one."""
        try:
            return max(1, round((self.every or Length(1, "steps")).in_steps(self.run, "every")))
        except ValueError:
            return 1

    def _warming(self, t: int) -> float:
        if self.warmup == "tensorflow":
            return (1 + t) / (10 + t)
        if self.warmup == "power":
            return float(1 - (1 + t) ** -self.power)
        return float(2 ** (-1 / (0.09 * t)))

    def absorb(self, weights: Weights, step: int) -> None:
        if not self.absorbed:
            self.first_step = step
            self._ema = kernels.accumulators(weights, wide=self.compensated)
        else:
            if self.absorbed == 1:
                self._warn_of_stall(step - self.absorbed_step)
            kernels.lerp_(self._ema, weights, 1 - self.kept(self.absorbed_step, step))

    def _warn_of_stall(self, elapsed: int) -> None:
        """Say so if float32 accumulators that absorb every ``elapsed`` steps would be no better than float16 ones."""
        beta = self.decay_per_step(self.run)
        if not 1 - STALL <= beta**elapsed < 1 or all(e.dtype in kernels.WIDE for e in self._ema.values()):
            return
        every = math.ceil(math.log1p(-STALL) / math.log(beta))
        warnings.warn(
            f"{self.name}: with a decay of {beta:.8g} per step, absorbing every {elapsed}, an average kept in float32 "
            f"stays up to {2**-24 / (1 - beta**elapsed):.1g} of a weight away from where it belongs: give "
            f"compensated=True (float64, 8 bytes per weight instead of 4) or every={every} or more",
            stacklevel=6,
        )

    def average(self, *, rounded: bool = False) -> Weights:
        return self._wide_or_rounded(self._ema, rounded)

    def tensors(self) -> Mapping[str, Weights]:
        return {"ema": self._ema} if self._ema else {}

    def numbers(self) -> dict[str, Any]:
        return {**super().numbers(), "first_step": self.first_step}

    def restore(self, tensors: Mapping[str, Weights], numbers: Mapping[str, Any]) -> None:
        self.first_step = int(numbers.get("first_step", 0))
        self._ema = kernels.accumulators(tensors.get("ema", {}), wide=self.compensated)
