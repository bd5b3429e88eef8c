"""The greedy soup: the best ingredient on held-out data, and each further one, best first, that does not make it worse.

    sort θ₁, θ₂, … by metric, best first;  S ← {θ₁};  for each further θᵢ: S ← S ∪ {θᵢ} unless mean(S ∪ {θᵢ}) is worse

It is never worse than its best ingredient on the data it was chosen with. Wortsman et al. 2022, "Model soups",
https://arxiv.org/abs/2203.05482, algorithm 1. `ranked` is the mean of just the n best, as in DiWA (Ramé et al. 2022,
https://arxiv.org/abs/2205.09739).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

from averaging.atomic import replacing
from averaging.checkpoints import Checkpoint
from averaging.soups import plots
from averaging.soups.evaluation import Best, Evaluate, Progress, check_best, evaluating, title
from averaging.soups.soup import Options, Paths, opened
from averaging.soups.uniform import Uniform
from averaging.text import aligned

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Tried:
    """An ingredient, its own metric, that of the soup tried with it, if any, and whether it is in the soup."""

    checkpoint: Checkpoint
    metric: float
    soup: float | None
    kept: bool


@dataclass(frozen=True)
class Chosen:
    """The result of `greedy` or `ranked`.

    Attributes:
        tried: the ingredients, best first.
        metric: that of the soup of those kept.
        weights: the soup: a `Checkpoint` if it was written, else tensors in memory.
    """

    tried: list[Tried]
    metric: float
    weights: Mapping[str, Tensor]

    def table(self) -> str:
        """A line per ingredient, best first; those in the soup are marked."""
        rows = [["ingredient", "alone", "soup"]]
        for one in self.tried:
            soup = "-" if one.soup is None else f"{one.soup:.6g}" + ("*" if one.kept else " ")
            rows.append([str(one.checkpoint.path), f"{one.metric:.6g}", soup])
        return "\n".join(aligned(rows))


def greedy(
    paths: Paths,
    evaluate: Evaluate,
    output: str | os.PathLike[str] | None = None,
    *,
    best: Best = "min",
    metric: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    plot: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Chosen:
    """Choose the ingredients of a uniform soup on held-out data, greedily.

    Args:
        paths: the checkpoints, as in `averaging.soups.uniform`; at least two.
        evaluate: takes a `Checkpoint`, a mapping from names to tensors that are read when asked for, whose ``path``
            opens with ``from_pretrained`` where those of the checkpoints do; returns the metric, or several by name.
        output: where the soup is written; ``None``: nothing is written.
        best: whether the lowest or the highest metric is best.
        metric: which one, if ``evaluate`` returns several.
        cache: a JSON file that keeps the results by the content evaluated: a search that was interrupted, or is
            repeated, evaluates nothing twice. It is for one ``evaluate``, by its name, and one set of data.
        plot: a ``.png``, ``.pdf`` or ``.svg`` file for a picture of the path (needs matplotlib); the uniform soup of
            all is then evaluated, too.
        progress: called before each evaluation with how many were done, how many there are and what is next.

    The other arguments are as in `averaging.soups.uniform`.

    Raises:
        ValueError: ``evaluate`` raised or returned something that is not a finite number, for the candidate named; and
            what `averaging.soups.uniform` raises. Nothing but the cache is written then.
        FileExistsError: the output exists and ``force`` is off.
    """
    return _choose(paths, evaluate, output, None, best, metric, cache, plot, progress, options)


def ranked(
    paths: Paths,
    evaluate: Evaluate,
    output: str | os.PathLike[str] | None = None,
    *,
    top: int,
    best: Best = "min",
    metric: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Chosen:
    """The uniform soup of the ``top`` best ingredients on held-out data; the arguments are those of `greedy`.

    Raises:
        ValueError: there are fewer than ``top``, and what `greedy` raises.
    """
    return _choose(paths, evaluate, output, top, best, metric, cache, None, progress, options)


def _choose(
    paths: Paths,
    evaluate: Evaluate,
    output: str | os.PathLike[str] | None,
    top: int | None,
    best: Best,
    metric: str | None,
    cache: str | os.PathLike[str] | None,
    plot: str | os.PathLike[str] | None,
    progress: Progress | None,
    options: Options,
) -> Chosen:
    check_best(best)
    models = opened(paths)
    Uniform(models, output, **options)  # complains now about what would be found wrong at the end
    if top is not None and not 1 <= top <= len(models):
        raise ValueError(f"top={top}: must be between 1 and the number of checkpoints, {len(models)}")
    plots.check_plot(plot, output, options.get("force", False))
    method = "greedy" if top is None else "ranked"
    temporary: Any = {**options, "force": True}
    make = partial(Uniform, method=method)
    sign = 1 if best == "min" else -1
    total = 2 * len(models) - 1 + (plot is not None) if top is None else len(models) + 1
    with evaluating(evaluate, output, metric, cache) as measure:

        def metric_of(chosen: Sequence[Checkpoint], done: int) -> float:
            what = " + ".join(str(model.path) for model in chosen)
            if progress is not None:
                progress(done, total, what)
            return measure(lambda **place: make(chosen, **{**temporary, **place}), what)

        alone = [metric_of([model], done) for done, model in enumerate(models)]
        order = sorted(range(len(models)), key=lambda i: sign * alone[i])
        if top is not None:
            soup = [models[i] for i in order[:top]]
            score = metric_of(soup, len(models)) if top > 1 else alone[order[0]]
            tried = [Tried(models[i], alone[i], score if n < top else None, n < top) for n, i in enumerate(order)]
        else:
            soup, score = [models[order[0]]], alone[order[0]]
            tried = [Tried(soup[0], score, score, True)]
            for done, i in enumerate(order[1:], start=len(models)):
                mixed = metric_of([*soup, models[i]], done)
                kept = sign * mixed <= sign * score
                tried.append(Tried(models[i], alone[i], mixed, kept))
                if kept:
                    soup, score = [*soup, models[i]], mixed
        uniform = score if plot is None else metric_of(models, total - 1)
    facts = {
        "metric": score,
        "best": best,
        "tried": [
            {"path": str(one.checkpoint.path), "metric": one.metric, "soup": one.soup, "kept": one.kept}
            for one in tried
        ],
    }
    with ExitStack() as stack:  # the picture and the soup, or neither
        if plot is not None:
            figure = plots.greedy_path(tried, uniform, best, title(evaluate, metric))
            plots.save(figure, stack.enter_context(replacing(plot)))
        return Chosen(tried, score, make(soup, output, facts=facts, **options).cook())
