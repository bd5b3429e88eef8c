"""Linear mode connectivity: the metric along the straight lines between ingredients, and the height of its barriers.

    L(α) at (1 − α) θ₁ + α θ₂;  barrier = max over α of L(α) − ((1 − α) L(0) + α L(1))

A soup of two models that have a barrier between them is worse than both. Frankle et al. 2020, "Linear mode connectivity
and the lottery ticket hypothesis", https://arxiv.org/abs/1912.05671; the barrier over the line between the ends:
Entezari et al. 2022, https://arxiv.org/abs/2110.06296.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Unpack

from averaging.atomic import replacing
from averaging.soups import plots
from averaging.soups.evaluation import Best, Evaluate, Progress, check_best, evaluating, title
from averaging.soups.soup import Options, Paths, opened
from averaging.soups.uniform import Uniform
from averaging.text import aligned

TOLERANCE = 0.02
SOUP = "soup"


@dataclass(frozen=True)
class Line:
    """The metric at points from one end, where alpha is 0, to the other, where it is 1.

    ``barrier`` is the height of the worst point over the straight line between the ends' metrics, and ``at`` the alpha
    where it is. The ends are connected unless the barrier is higher than the difference between them, and than 2 % of
    their mean, which noise may be.
    """

    ends: tuple[str, str]
    alphas: list[float]
    metrics: list[float]
    barrier: float
    at: float
    connected: bool


@dataclass(frozen=True)
class Connectivity:
    """The result of `connectivity`.

    Attributes:
        paths: the ingredients; in the lines they go by their number, from 1 on, and their uniform soup by ``"soup"``.
        lines: those between each two ingredients, then, of three or more, those from each to the soup.
        metric: what was measured, and ``best``, whether the lowest or the highest is best.
    """

    paths: list[str]
    lines: list[Line]
    metric: str
    best: Best

    def __str__(self) -> str:
        rows = [[f"{self.metric} along straight lines", "", "ends", "", "worst", "barrier", ""]]
        for line in self.lines:
            worst = (max if self.best == "min" else min)(line.metrics)
            numbers = [f"{n:.5g}" for n in (line.metrics[0], line.metrics[-1], worst, line.barrier)]
            verdict = "connected" if line.connected else "NOT mode-connected"
            rows.append([f"  {line.ends[0]} to {line.ends[1]}", "", *numbers, verdict])
        return "\n".join(line.rstrip() for line in aligned(rows))


def connectivity(
    paths: Paths,
    evaluate: Evaluate,
    *,
    points: int = 11,
    best: Best = "min",
    metric: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    plot: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Connectivity:
    """Evaluate models on the straight lines between all ingredients, and between each and their uniform soup.

    N ingredients have N (N − 1) / 2 lines between them, and N to the soup if there are more than two. Each model is
    written to the system's temporary folder for as long as it is evaluated.

    Args:
        paths: the checkpoints, as in `averaging.soups.uniform`; at least two.
        evaluate, best, metric, cache, progress: as in `averaging.soups.greedy`.
        points: how many models of each line are evaluated, both ends included.
        plot: a ``.png``, ``.pdf`` or ``.svg`` file for a picture of the lines (needs matplotlib).

    The other arguments are as in `averaging.soups.uniform`, ``force`` for the picture. What ``only`` and ``skip`` leave
    out is everywhere the last checkpoint's, or that of ``like``.

    Raises:
        ValueError: fewer than three points, and what `averaging.soups.greedy` raises.
        FileExistsError: the picture exists and ``force`` is off.
    """
    check_best(best)
    if points < 3:
        raise ValueError(f"points={points!r}: must be at least 3, of which two are the ends")
    models = opened(paths)
    plots.check_plot(plot, None, options.get("force", False))
    Uniform(models, **options)  # complains now about what would be found wrong later
    settings: Any = {**options, "like": options.get("like") or models[-1], "force": True}
    sign = 1 if best == "min" else -1
    places = range(len(models))
    ends = {str(i + 1): [float(i == j) for j in places] for i in places}
    pairs = list(itertools.combinations(ends, 2))
    if len(models) > 2:
        pairs += [(name, SOUP) for name in ends]
        ends[SOUP] = [1 / len(models)] * len(models)
    alphas = [i / (points - 1) for i in range(points)]
    total, done = len(ends) + len(pairs) * (points - 2), 0

    with evaluating(evaluate, None, metric, cache) as measure:

        def value(weights: Sequence[float], what: str) -> float:
            nonlocal done
            if progress is not None:
                progress(done, total, what)
            done += 1
            chosen = [model for model, weight in zip(models, weights, strict=True) if weight]
            make = partial(Uniform, chosen, weights=[w for w in weights if w], method="line")
            return measure(lambda **place: make(**{**settings, **place}), what)

        named = {SOUP: "the uniform soup", **{str(i + 1): str(models[i].path) for i in places}}
        known = {name: value(weights, named[name]) for name, weights in ends.items()}
        lines = []
        for one, other in pairs:
            between = [
                value(
                    [(1 - a) * x + a * y for x, y in zip(ends[one], ends[other], strict=True)],
                    f"the line from {named[one]} to {named[other]} at {a:.3g}",
                )
                for a in alphas[1:-1]
            ]
            lines.append(_line((one, other), alphas, [known[one], *between, known[other]], sign))
    result = Connectivity([str(model.path) for model in models], lines, title(evaluate, metric), best)
    with ExitStack() as stack:
        if plot is not None:
            plots.save(plots.lines(result), stack.enter_context(replacing(plot)))
    return result


def _line(ends: tuple[str, str], alphas: list[float], metrics: list[float], sign: int) -> Line:
    first, last = metrics[0], metrics[-1]
    heights = [sign * (m - ((1 - a) * first + a * last)) for a, m in zip(alphas, metrics, strict=True)]
    barrier = max(0.0, *heights)
    highest = max(range(len(heights)), key=heights.__getitem__)
    connected = barrier <= max(abs(last - first), TOLERANCE * (abs(first) + abs(last)) / 2)
    return Line(ends, alphas, metrics, barrier, alphas[highest], connected)
