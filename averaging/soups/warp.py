"""WARP's offline half: a round's policies are merged by SLERP, then drawn back towards where the round began (LITI).

    θ_slerp = θ_init + slerp(τ₁, …, τ_M), tensor by tensor, with τᵢ = θᵢ − θ_init
    θ(η) = (1 − η) θ_init + η θ_slerp

The first half of a round, training against an EMA of the policy, is `averaging.EMAAnchor`; the next round starts from
θ(η). Ramé et al. 2024, "WARP: On the Benefits of Weight Averaged Rewarded Policies", https://arxiv.org/abs/2406.16768,
sections 3.2 and 3.3 and algorithm 1; appendix B.3 for more than two policies.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Unpack

from averaging.soups.slerp import Slerp
from averaging.soups.soup import Options, PathLike, Paths, Products

if TYPE_CHECKING:
    from torch import Tensor

    from averaging.soups.engine import Progress

ETA = 0.3
"""What the paper's rounds take (section 4)."""


def warp(
    paths: Paths,
    output: str | os.PathLike[str] | None = None,
    *,
    init: PathLike,
    weights: Sequence[float] | None = None,
    eta: float = ETA,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Mapping[str, Tensor]:
    """Merge the policies of one round of WARP on the sphere and go back towards their initial model.

    `averaging.soups.series` writes θ(η) for many η at once, and `averaging.soups.curve` evaluates them.

    Args:
        paths: the policies, as in `averaging.soups.uniform`; a single one is only drawn back.
        init: the model that they were fine-tuned from: the SFT model, or what the round before ended with.
        weights: λ, one number for each, not negative, as in `averaging.soups.slerp`; ``None``: all alike.
        eta: 0 is ``init``, 1 the merged model.

    ``output``, ``progress``, the other arguments, what is returned and raised are as in `averaging.soups.uniform`;
    NaN and infinity are always errors.

    Raises:
        ValueError: besides, a policy that equals ``init``: its task vector is zero and has no direction.
    """
    return Warp(paths, output, init=init, weights=weights, eta=eta, **options).cook(progress)


class Warp(Slerp):
    """What `warp` cooks."""

    def __init__(
        self,
        paths: Paths,
        output: str | os.PathLike[str] | None = None,
        *,
        init: PathLike,
        weights: Sequence[float] | None = None,
        eta: float = ETA,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(paths, output, init=init, weights=weights, eta=eta, method="warp", **options)

    def measured(self, products: Products | None) -> Mapping[str, Sequence[float]] | None:
        """The coefficients of each tensor; no task vector may be zero as a whole."""
        for number, policy in enumerate(self.ingredients[1:], start=1):
            if not any(gram[number][number] for gram in (products or {}).values()):
                raise ValueError(
                    f"{policy.path} equals the initial model {self.ingredients[0].path}: its task vector is zero; "
                    "leave it out"
                )
        return super().measured(products)
