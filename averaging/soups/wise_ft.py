"""WiSE-FT: θ = (1 − α)·θ_zeroshot + α·θ_finetuned.

Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", https://arxiv.org/abs/2109.01903, section 3.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Unpack

from averaging.soups.soup import Options, PathLike, Paths, Soup, check_fraction, opened

if TYPE_CHECKING:
    from torch import Tensor

    from averaging.soups.engine import Progress


def wise_ft(
    zeroshot: PathLike,
    finetuned: PathLike,
    output: str | os.PathLike[str] | None = None,
    *,
    alpha: float = 0.5,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Mapping[str, Tensor]:
    """A model between a pretrained one and the one fine-tuned from it: often better than either on shifted data.

    Args:
        zeroshot: the model that fine-tuning began with.
        finetuned: what it became.
        alpha: 0 is ``zeroshot``, 1 is ``finetuned``.

    ``output``, ``progress``, the other arguments, what is returned and raised are as in `averaging.soups.uniform`.
    """
    return WiseFT([finetuned], output, init=zeroshot, alpha=alpha, **options).cook(progress)


class WiseFT(Soup):
    """What `wise_ft` cooks."""

    def __init__(
        self,
        finetuned: Paths,
        output: str | os.PathLike[str] | None = None,
        *,
        init: PathLike,
        alpha: float = 0.5,
        **options: Unpack[Options],
    ) -> None:
        models = opened(finetuned)
        if len(models) != 1:
            raise ValueError(f"WiSE-FT takes a single fine-tuned model, not {len(models)}")
        alpha = check_fraction("alpha", alpha)
        super().__init__(
            models, output, init=init, weights=[alpha], method="wise-ft", facts={"alpha": alpha}, **options
        )
