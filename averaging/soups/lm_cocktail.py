"""LM-Cocktail: models weighted by how well they do on a few examples of a task,

    θ = Σ wᵢθᵢ,  w = softmax(−L/τ),  Lᵢ the loss of model i;

or, beside a model fine-tuned for that task, θ = α θ_target + (1 − α) Σ wᵢθᵢ. Xiao et al. 2023, "LM-Cocktail: Resilient
Tuning of Language Models via Model Merging", https://arxiv.org/abs/2311.13534, section 2.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

from averaging.checkpoints import Checkpoint
from averaging.soups.evaluation import Best, Evaluate, Progress, check_best, evaluating
from averaging.soups.soup import Options, PathLike, Paths, Soup, check_fraction, opened
from averaging.text import aligned

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Cocktail:
    """The result of `lm_cocktail`.

    Attributes:
        models: the models, the target last if there is one.
        metrics: the metric of each, ``None`` for the target.
        shares: what each is multiplied by; they sum to one.
        weights: the soup: a `Checkpoint` if it was written, else tensors in memory.
    """

    models: list[Checkpoint]
    metrics: list[float | None]
    shares: list[float]
    weights: Mapping[str, Tensor]

    def table(self) -> str:
        """A line per model."""
        rows = [["model", "alone", "share"]]
        for model, metric, share in zip(self.models, self.metrics, self.shares, strict=True):
            rows.append([str(model.path), "target" if metric is None else f"{metric:.6g}", f"{share:.4f}"])
        return "\n".join(aligned(rows))


def lm_cocktail(
    paths: Paths,
    evaluate: Evaluate,
    output: str | os.PathLike[str] | None = None,
    *,
    target: PathLike | None = None,
    alpha: float = 0.5,
    temperature: float = 5.0,
    best: Best = "min",
    metric: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Cocktail:
    """Mix models the more the lower their loss on a few examples.

    Args:
        paths: the models, as in `averaging.soups.uniform`: specialists, and often the one they were fine-tuned from.
        evaluate: returns the loss, as in `averaging.soups.greedy`.
        target: a model fine-tuned for the task, which is not evaluated.
        alpha: its share.
        temperature: τ, in units of the loss; higher is more uniform.
        best: ``"max"`` for a metric of which more is better: w = softmax(metric/τ).
        metric, cache, progress: as in `averaging.soups.greedy`.

    The other arguments, what is raised and ``output`` are as in `averaging.soups.greedy`.
    """
    check_best(best)
    alpha = check_fraction("alpha", alpha)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature!r}: must be a positive number")
    models = opened(paths)
    if len(models) < 2 - (target is not None):
        found = f"only {models[0].path}" if models else "none"
        raise ValueError(f"LM-Cocktail needs at least two models, the target included, found {found}")
    alone: list[Checkpoint] = models if target is None else [*models, _other(target, models)]
    make = partial(Soup, method="lm-cocktail")
    make(alone, output, **options)  # complains now about what would be found wrong at the end
    temporary: Any = {**options, "force": True}
    losses = []
    with evaluating(evaluate, output, metric, cache) as measure:
        for number, model in enumerate(models):
            if progress is not None:
                progress(number, len(models), str(model.path))
            losses.append(measure(partial(_alone, model, temporary), str(model.path)))
    weights = softmax([(-loss if best == "min" else loss) / temperature for loss in losses])
    shares = weights if target is None else [*((1 - alpha) * weight for weight in weights), alpha]
    metrics = [*losses, *([None] if target is not None else [])]
    facts: dict[str, Any] = {"temperature": float(temperature), "best": best, "metrics": metrics}
    if target is not None:
        facts["alpha"] = alpha
    return Cocktail(alone, metrics, shares, make(alone, output, weights=shares, facts=facts, **options).cook())


def softmax(scores: Sequence[float]) -> list[float]:
    """exp(sᵢ) / Σ exp(sⱼ)."""
    highest = max(scores)
    powers = [math.exp(score - highest) for score in scores]
    total = math.fsum(powers)
    return [power / total for power in powers]


def _alone(model: Checkpoint, options: Any, **place: Any) -> Soup:
    return Soup([model], method="lm-cocktail", **{**options, **place})


def _other(target: PathLike, models: Sequence[Checkpoint]) -> Checkpoint:
    """The target, which is none of the others."""
    opened = target if isinstance(target, Checkpoint) else Checkpoint(target)
    real = os.path.realpath(opened.path)
    if any(os.path.realpath(model.path) == real for model in models):
        raise ValueError(f"{opened.path} is both the target and one of the models; name it once")
    return opened
