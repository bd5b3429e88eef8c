"""The weights of a reference policy that follows the policy being trained.

    e ← (1 − μ) e + μ θ    at each multiple of every, e₀ = the reference's own weights

Ramé et al. 2024, "WARP: On the Benefits of Weight Averaged Rewarded Policies" (arXiv:2406.16768), section 3.1: the KL
term of RLHF draws the policy to its own exponential moving average rather than to the initial policy, with μ = 0.01
after every step (section 4: Gemma 7B, β = 0.1, 9000 steps). Gorbatovski et al. 2024, "Learn Your Reference Model for
Real Good Alignment" (arXiv:2404.09656): TR-DPO and its kin update the reference every τ steps, softly with α = μ < 1 or
hard with α = μ = 1; trl's defaults are α = 0.6 and τ = 512.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from averaging import kernels
from averaging.averager import Averager
from averaging.schedule import Span

if TYPE_CHECKING:
    from torch import Tensor

    from averaging.weights import Weights


class EMAAnchor(Averager):
    """The average of a policy that serves as its reference, accumulated in float32 or better.

    `averaging.transformers.EMAAnchor` keeps the reference of TRL's trainers there; `averaging.Reference` any other.

        EMAAnchor()                     # WARP, stage 1
        EMAAnchor(mu=0.6, every=512)    # TR-DPO, soft updates
        EMAAnchor(mu=1.0, every=512)    # TR-DPO, hard updates

    The first weights offered are e₀, whatever the schedule says. Costs one float32 copy of the weights.

    Args:
        mu: μ, the share of the policy in each update, between 0 and 1. It is per update, while `EMA`'s decay is per
            optimizer step.
        every: spacing of the updates: optimizer steps, ``"epoch"``, or a fraction of the run; by default 1 step.
        start: first point of training at which to update, in the same units.
        name, frozen, buffers: as in `Averager`; the name is ``"anchor"`` by default.

    Raises:
        ValueError: ``mu`` outside [0, 1].
    """

    def __init__(
        self,
        mu: float = 0.01,
        *,
        every: Span | None = None,
        start: Span = 0,
        name: str | None = None,
        frozen: bool = False,
        buffers: bool = False,
    ) -> None:
        if not 0 <= mu <= 1:
            raise ValueError(f"mu={mu!r}: must be between 0 (the reference stays) and 1 (it becomes the policy)")
        self.mu = mu
        self._ema: dict[str, Tensor] = {}
        super().__init__(every=every, start=start, name=name or "anchor", frozen=frozen, buffers=buffers)

    def describe(self, weights: Weights) -> str:
        return f"the reference, {self.mu:g} of the way to the policy each time; {self._cost(weights)}"

    def problem(self) -> str | None:
        if super().problem() is None:
            return None
        return (
            f"the reference would first move after {self.first_average()} optimizer steps but the run ends after "
            f"{self.run.steps}: it will stay as it is"
        )

    def due(self, last: tuple[int, float], now: tuple[int, float | None]) -> bool:
        return not self.absorbed or super().due(last, now)

    def absorb(self, weights: Weights, step: int) -> None:
        if not self.absorbed:
            self._ema = kernels.accumulators(weights)
        else:
            kernels.lerp_(self._ema, weights, self.mu)

    def average(self, *, rounded: bool = False) -> Weights:
        return self._wide_or_rounded(self._ema, rounded)

    def tensors(self) -> Mapping[str, Weights]:
        return {"ema": self._ema} if self._ema else {}

    def restore(self, tensors: Mapping[str, Weights], numbers: Mapping[str, Any]) -> None:
        self._ema = kernels.accumulators(tensors.get("ema", {}))

    def _not_a_callback(self) -> str:
        return (
            "averaging.EMAAnchor is a plain averager, not a trainer's callback: use "
            "`from averaging.transformers import EMAAnchor` for TRL's trainers, or averaging.Reference in your own loop"
        )
