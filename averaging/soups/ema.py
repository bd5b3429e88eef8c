"""EMA over checkpoints: e ← βⁿ e + (1 − βⁿ) θ, with n the optimizer steps since the checkpoint before.

The first checkpoint is copied: what `averaging.EMA` would be had it absorbed just these (Tarvainen and Valpola 2017,
https://arxiv.org/abs/1703.01780).
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Unpack

from averaging.soups.soup import Options, Paths, opened
from averaging.soups.uniform import Uniform

if TYPE_CHECKING:
    from torch import Tensor

    from averaging.soups.engine import Progress


def ema(
    paths: Paths,
    output: str | os.PathLike[str] | None = None,
    *,
    decay: float,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Mapping[str, Tensor]:
    """The EMA over the checkpoints of one run.

    Args:
        paths: checkpoints whose steps are known, in any order, as in `averaging.soups.uniform`.
        decay: β, per optimizer step.

    ``output``, ``progress``, the other arguments, what is returned and raised are as in `averaging.soups.uniform`.
    """
    return EMA(paths, output, decay=decay, **options).cook(progress)


class EMA(Uniform):
    """What `ema` cooks."""

    def __init__(
        self,
        paths: Paths,
        output: str | os.PathLike[str] | None = None,
        *,
        decay: float,
        **options: Unpack[Options],
    ) -> None:
        check_ema(decay)
        models = opened(paths)
        if len(models) < 2:
            raise ValueError(f"an EMA needs at least two checkpoints, found {len(models)}")
        for model in models:
            if model.step is None:
                raise ValueError(f"an EMA needs the step of each checkpoint, and that of {model.path} is not known")
        models.sort(key=lambda model: model.step or 0)
        weights = ema_weights([model.step or 0 for model in models], decay)
        super().__init__(models, output, weights=weights, method="ema", facts={"decay": decay}, **options)


def check_ema(decay: float) -> None:
    """Raise ValueError unless ``decay`` makes sense."""
    if not 0 <= decay < 1:
        raise ValueError(f"decay={decay!r}: must be at least 0 and less than 1, per optimizer step")


def ema_weights(steps: Sequence[int], decay: float) -> list[float]:
    """The weights of checkpoints at ``steps`` in an EMA with ``decay`` per optimizer step; they sum to one."""
    kept = [0.0] + [decay ** (after - before) for before, after in itertools.pairwise(steps)]
    return [(1 - kept[i]) * math.prod(kept[i + 1 :]) for i in range(len(steps))]
