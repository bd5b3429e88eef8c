"""The uniform soup: θ = Σ wᵢθᵢ / Σ wᵢ, with wᵢ = 1 unless weights are given.

Wortsman et al. 2022, "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
increasing inference time", https://arxiv.org/abs/2203.05482. Of the latest checkpoints of one run it is LAWA, computed
after the fact (Kaddour 2022, https://arxiv.org/abs/2209.14981); of reward models that were fine-tuned from one model
with different settings it is WARM (Ramé et al. 2024, "WARM: On the Benefits of Weight Averaged Reward Models",
https://arxiv.org/abs/2401.12187, section 3).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from averaging.checkpoints import Checkpoint
from averaging.decay import Decay, decay_weights
from averaging.soups.soup import Lora, Options, Paths, Soup, check_numbers, opened

if TYPE_CHECKING:
    from torch import Tensor

    from averaging.soups.engine import Progress


def uniform(
    paths: Iterable[str | os.PathLike[str] | Checkpoint] | str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    weights: Sequence[float] | Decay | None = None,
    like: str | os.PathLike[str] | Checkpoint | None = None,
    dtype: str | None = None,
    allow_nonfinite: bool = False,
    force: bool = False,
    only: str | None = None,
    skip: str | None = None,
    lora: Lora | None = None,
    lora_rank: int | None = None,
    progress: Progress | None = None,
) -> Mapping[str, Tensor]:
    """Average saved checkpoints: Σ wᵢθᵢ / Σ wᵢ, summed in float64 and rounded once.

    Every entry of the result is the number of the output's dtype that is nearest to the mean, ties to even.
    Everything that is not a floating-point tensor must be the same in all checkpoints; BatchNorm's
    ``num_batches_tracked`` is the last one's. With an output, memory does not grow with the number or size of the
    checkpoints.

    Args:
        paths: checkpoints (see `averaging.checkpoints.Checkpoint`), or folders of checkpoints, which are taken in
            the order of their steps (see `averaging.checkpoints.gather`).
        output: the folder or ``.safetensors`` file to write. A Hugging Face model or PEFT adapter is written as a
            folder of the same kind. ``None``: nothing is written.
        weights: one number per checkpoint, in their order; they need not sum to one. Or how the learning rate would
            fall over checkpoints at even distances, ``"linear"``, ``"cosine"`` or ``"inverse_sqrt"``
            (see `averaging.decay`). ``None``: all alike.
        like: a whole checkpoint of the model, where the ingredients hold only some of its weights: the result is the
            same kind of thing, with its files and dtypes, and what the ingredients do not hold is copied from it.
            ``None``: the last ingredient, or for snapshots of a `Trajectory` the folder ``template`` beside them.
        dtype: "bfloat16", "float16", "float32" or "float64" for the floating-point tensors of the result.
            ``None``: as in the checkpoints, or in ``like``.
        allow_nonfinite: go on when a checkpoint holds NaN or infinity.
        force: replace an existing output.
        only: a regular expression found in the names of the tensors to average, and ``skip``, one in the names of those
            not to: the others are copied from ``like``, or from the last checkpoint, and may differ in shape.
        lora: what is averaged of LoRA adapters: ``"factors"`` (if ``None``), A and B one by one; or ``"product"``, what
            they add to the model's weights (see `averaging.soups.lora`). The result is then the nearest adapter of rank
            ``lora_rank``, and the record tells its relative error. ``None``: the largest rank that each module has in
            an adapter. With the sum of the ranks it is exact.
        progress: called from time to time with the bytes read and the bytes to read.

    Returns:
        The averaged weights: in memory without ``output``, else as a `Checkpoint` that reads them from there.

    Raises:
        ValueError: checkpoints that are corrupt, do not belong together, or hold NaN or infinity; weights or dtype
            that make no sense; an output that is an ingredient. The message names file and tensor.
        FileNotFoundError: a path does not exist or holds no checkpoints.
        FileExistsError: the output exists and ``force`` is off.
        OSError: no permission, no room. Whatever stops it, an earlier output stays as it was.

    Warns:
        UserWarning: two checkpoints have the same content.
    """
    return Uniform(
        paths,
        output,
        weights=weights,
        like=like,
        dtype=dtype,
        allow_nonfinite=allow_nonfinite,
        force=force,
        only=only,
        skip=skip,
        lora=lora,
        lora_rank=lora_rank,
    ).cook(progress)


class Uniform(Soup):
    """A uniform soup, checked and ready to be cooked; the arguments are those of `uniform`.

    ``method`` and what else is in ``facts`` go into the record of the soup.
    """

    def __init__(
        self,
        paths: Paths,
        output: str | os.PathLike[str] | None = None,
        *,
        weights: Sequence[float] | Decay | None = None,
        method: str = "uniform",
        facts: Mapping[str, Any] | None = None,
        **options: Unpack[Options],
    ) -> None:
        models = opened(paths)
        if method == "uniform" and len(models) < 2:
            found = f"only {models[0].path}" if models else "none"
            raise ValueError(f"a soup needs at least two checkpoints, found {found}")
        own = None if weights is None else checked_weights(weights, models)
        super().__init__(
            models,
            output,
            weights=own,
            divisor=float(len(models)) if own is None else math.fsum(own),
            method=method,
            facts=facts,
            twins=method == "uniform",  # two EMAs are the same until the second absorption
            **options,
        )


def checked_weights(weights: Sequence[float] | Decay, ingredients: Sequence[Checkpoint]) -> list[float] | None:
    """One number per ingredient, of a positive sum; ``None`` stands for ones."""
    if isinstance(weights, str):
        if weights == "linear":
            return None
        steps = [ingredient.step for ingredient in ingredients if ingredient.step is not None]
        if steps != sorted(steps):
            raise ValueError(f"weights={weights!r} are for checkpoints in the order of their steps, not {steps}")
        return decay_weights(weights, len(ingredients))
    weights = check_numbers("weights", weights, ingredients)
    if not math.fsum(weights) > 0:
        raise ValueError(f"the weights {weights} must have a positive sum")
    return weights
