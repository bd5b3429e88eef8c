"""SLERP of task vectors, tensor by tensor, and LITI: θ = θ_init + η·slerp(τ₁, …, τ_M), with τᵢ = θᵢ − θ_init and

    slerp(a, b; λ) = sin((1−λ)Ω)/sin Ω · a + sin(λΩ)/sin Ω · b,  Ω the angle between a and b,

for more than two one after the other: s₁ = τ₁, s_m = slerp(s_{m−1}, τ_m; 1/m). Unlike a mean it keeps the length of
task vectors that point in different directions. η < 1 goes back towards the initial model (LITI: linear interpolation
towards the initialization).

Ramé et al. 2024, "WARP: On the Benefits of Weight Averaged Rewarded Policies", https://arxiv.org/abs/2406.16768,
sections 3.2 (SLERP) and 3.3 (LITI); appendix B.3, equation 26, for more than two.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Unpack

from averaging.soups.soup import Options, PathLike, Paths, Soup, check_fraction, check_numbers, opened

if TYPE_CHECKING:
    from torch import Tensor

    from averaging.soups.engine import Progress

PARALLEL = 1e-7
"""sin Ω below which the angle is not to be had from float64 products; the interpolation is linear there."""


def slerp(
    init: PathLike,
    paths: Paths,
    output: str | os.PathLike[str] | None = None,
    *,
    weights: Sequence[float] | None = None,
    eta: float = 1.0,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Mapping[str, Tensor]:
    """Merge fine-tuned models on the sphere, and go back towards the initial one if ``eta`` is less than 1.

    Where task vectors are zero, parallel or opposite (within rounding) the interpolation is linear.

    Args:
        init: the model that the others were fine-tuned from.
        paths: these, as in `averaging.soups.uniform`, at least two.
        weights: one number for each, not negative: λ is the share of the m-th among the first m. (1 − λ, λ) of two
            gives slerp(τ₁, τ₂; λ); ``None``: all alike.
        eta: 1 is the merged model, 0 the initial one.

    ``output``, ``progress``, the other arguments, what is returned and raised are as in `averaging.soups.uniform`;
    NaN and infinity are always errors.
    """
    return Slerp(paths, output, init=init, weights=weights, eta=eta, **options).cook(progress)


class Slerp(Soup):
    """What `slerp` cooks."""

    def __init__(
        self,
        paths: Paths,
        output: str | os.PathLike[str] | None = None,
        *,
        init: PathLike,
        weights: Sequence[float] | None = None,
        eta: float = 1.0,
        method: str = "slerp",
        **options: Unpack[Options],
    ) -> None:
        models = opened(paths)
        if method == "slerp" and len(models) < 2:
            raise ValueError(f"SLERP needs at least two fine-tuned models, found {len(models)}")
        shares = check_numbers("weights", [1.0] * len(models) if weights is None else weights, models)
        if min(shares) < 0 or not sum(shares) > 0:
            raise ValueError(f"the weights {shares} must not be negative, and not all zero")
        eta = check_fraction("eta", eta)
        super().__init__(
            models,
            output,
            init=init,
            formula=lambda products: [eta * c for c in coefficients(products, shares)],
            method=method,
            facts={"eta": eta, "weights": shares},
            **options,
        )


def coefficients(products: Sequence[Sequence[float]], shares: Sequence[float]) -> list[float]:
    """What the task vectors are multiplied by, from their inner products."""
    found = [1.0]
    for m in range(1, len(shares)):
        until_now = math.fsum(shares[: m + 1])
        share = shares[m] / until_now if until_now else 0.0
        dot = math.fsum(c * products[i][m] for i, c in enumerate(found))
        square = math.fsum(c * d * products[i][j] for i, c in enumerate(found) for j, d in enumerate(found))
        one, two = _pair(math.sqrt(max(square, 0.0)), math.sqrt(products[m][m]), dot, share)
        found = [one * c for c in found] + [two]
    return found


def _pair(one: float, two: float, dot: float, share: float) -> tuple[float, float]:
    """What two vectors of these lengths and this inner product are multiplied by."""
    if one and two:
        angle = math.acos(min(max(dot / one / two, -1.0), 1.0))
        if math.sin(angle) >= PARALLEL:
            return math.sin((1 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle)
    return 1 - share, share
