"""Rewarded soups: θ(λ) = (1 − λ) θ₁ + λ θ₂, between policies fine-tuned from one model for different rewards.

As λ goes from 0 to 1, so does the trade-off between the rewards: for two trainings instead of one for each λ.
Ramé et al. 2023, "Rewarded soups: towards Pareto-optimal alignment by interpolating weights fine-tuned on diverse
rewards", https://arxiv.org/abs/2306.04488, section 2.2. Of more than two it is `averaging.soups.uniform` with weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Unpack

from averaging.soups.soup import Options, Paths, check_fraction, opened
from averaging.soups.uniform import Uniform

if TYPE_CHECKING:
    from torch import Tensor

    from averaging.soups.engine import Progress


def rewarded(
    paths: Paths,
    output: str | os.PathLike[str] | None = None,
    *,
    share: float = 0.5,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Mapping[str, Tensor]:
    """A model between two that were fine-tuned from one for different rewards.

    `averaging.soups.curve` evaluates many of them and draws the front that they make.

    Args:
        paths: the two, as in `averaging.soups.uniform`.
        share: λ: 0 is the first, 1 the second.

    ``output``, ``progress``, the other arguments, what is returned and raised are as in `averaging.soups.uniform`.
    """
    return Rewarded(paths, output, share=share, **options).cook(progress)


class Rewarded(Uniform):
    """What `rewarded` cooks."""

    def __init__(
        self,
        paths: Paths,
        output: str | os.PathLike[str] | None = None,
        *,
        share: float = 0.5,
        **options: Unpack[Options],
    ) -> None:
        models = opened(paths)
        if len(models) != 2:
            raise ValueError(f"a rewarded soup lies between two models, not {len(models)}; of more, give --weights")
        share = check_fraction("lambda", share)
        super().__init__(
            models, output, weights=[1 - share, share], method="rewarded", facts={"lambda": share}, **options
        )
