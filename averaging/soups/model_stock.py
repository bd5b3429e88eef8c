"""Model Stock, tensor by tensor: θ = t·mean(θᵢ) + (1 − t)·θ_init, with N fine-tuned models and

    t = N cos φ / (1 + (N − 1) cos φ),  cos φ the mean cosine between two task vectors θᵢ − θ_init.

It is the point of the plane through all models that is nearest to where the mean of infinitely many would be.
Jang, Yun and Han 2024, "Model Stock: All we need is just a few fine-tuned models", https://arxiv.org/abs/2403.19522,
section 4.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Unpack

from averaging.soups.soup import Options, PathLike, Paths, Soup, opened

if TYPE_CHECKING:
    from torch import Tensor

    from averaging.soups.engine import Progress


def model_stock(
    init: PathLike,
    paths: Paths,
    output: str | os.PathLike[str] | None = None,
    *,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Mapping[str, Tensor]:
    """The mean of fine-tuned models, drawn the further towards the initial one the less they agree.

    Where the task vectors point away from each other (cos φ ≤ 0) nothing is known of their centre, and t = 0 is the
    initial model; the formula would go beyond it. A task vector of zero has a cosine of 0 with any other.

    Args:
        init: the model that the others were fine-tuned from.
        paths: these, as in `averaging.soups.uniform`, at least two.

    ``output``, ``progress``, the other arguments, what is returned and raised are as in `averaging.soups.uniform`;
    NaN and infinity are always errors.
    """
    return ModelStock(paths, output, init=init, **options).cook(progress)


class ModelStock(Soup):
    """What `model_stock` cooks."""

    def __init__(
        self,
        paths: Paths,
        output: str | os.PathLike[str] | None = None,
        *,
        init: PathLike,
        **options: Unpack[Options],
    ) -> None:
        models = opened(paths)
        if len(models) < 2:
            raise ValueError(f"Model Stock needs at least two fine-tuned models, found {len(models)}")
        super().__init__(models, output, init=init, formula=coefficients, method="model-stock", **options)


def coefficients(products: Sequence[Sequence[float]]) -> list[float]:
    """What the task vectors are multiplied by, from their inner products."""
    count = len(products)
    norms = [math.sqrt(products[i][i]) for i in range(count)]
    cosines = [
        products[i][j] / norms[i] / norms[j] if norms[i] and norms[j] else 0.0
        for i, j in itertools.combinations(range(count), 2)
    ]
    cosine = min(max(math.fsum(cosines) / len(cosines), 0.0), 1.0)
    return [cosine / (1 + (count - 1) * cosine)] * count
