"""Task arithmetic: θ = θ_init + λ Σ sᵢ τᵢ, with the task vectors τᵢ = θᵢ − θ_init and sᵢ = 1 unless weights are given.

Adding teaches tasks, s = −1 makes a model forget one, and s = (−1, 1, 1) of A, B and C is the analogy "A is to B as C
is to the result". Ilharco et al. 2023, "Editing Models with Task Arithmetic", https://arxiv.org/abs/2212.04089,
section 2.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Unpack

from averaging.soups.soup import Options, PathLike, Paths, Soup, check_numbers, opened

if TYPE_CHECKING:
    from torch import Tensor

    from averaging.soups.engine import Progress


def task(
    init: PathLike,
    paths: Paths,
    output: str | os.PathLike[str] | None = None,
    *,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Mapping[str, Tensor]:
    """Add task vectors to a model, or take them away.

    Args:
        init: the model that the others were fine-tuned from.
        paths: these, as in `averaging.soups.uniform`; a single one will do.
        weights: one number sᵢ for each, of any sign; ones if ``None``.
        scale: λ.

    ``output``, ``progress``, the other arguments, what is returned and raised are as in `averaging.soups.uniform`.
    """
    return Task(paths, output, init=init, weights=weights, scale=scale, **options).cook(progress)


class Task(Soup):
    """What `task` cooks."""

    def __init__(
        self,
        paths: Paths,
        output: str | os.PathLike[str] | None = None,
        *,
        init: PathLike,
        weights: Sequence[float] | None = None,
        scale: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        models = opened(paths)
        if not math.isfinite(scale):
            raise ValueError(f"scale={scale!r}: must be a finite number")
        signs = check_numbers("weights", [1.0] * len(models) if weights is None else weights, models)
        if not math.isfinite(scale * sum(map(abs, signs))):
            raise ValueError(f"scale={scale!r} times the weights {signs}: too large to be added up")
        super().__init__(
            models,
            output,
            init=init,
            weights=[scale * sign for sign in signs],
            method="task",
            facts={"scale": float(scale)},
            **options,
        )
