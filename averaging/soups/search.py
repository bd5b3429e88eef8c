"""The learned soup without a gradient: coefficients found by CMA-ES, for any metric.

    c = softmax(a);  a from CMA-ES, which starts at zero (the uniform soup) with the standard deviation one

Of the uniform soup, each ingredient alone and all that was tried, the best is written: it is never worse than any of
them on the data it was chosen with. Learned soups: Wortsman et al. 2022, https://arxiv.org/abs/2203.05482; CMA-ES:
Hansen 2016, "The CMA evolution strategy: a tutorial", https://arxiv.org/abs/1604.00772, by the package ``cma``.
"""

from __future__ import annotations

import math
import os
from typing import Any, Unpack

from averaging.soups import plots
from averaging.soups.evaluation import Best, Evaluate, Progress, check_best, evaluating
from averaging.soups.inspection import ALL
from averaging.soups.learned import Candidate, Learned, Per, Rows, Space
from averaging.soups.lm_cocktail import softmax
from averaging.soups.soup import Options, Paths, opened


def search(
    paths: Paths,
    evaluate: Evaluate,
    output: str | os.PathLike[str] | None = None,
    *,
    per: Per = "model",
    evaluations: int = 100,
    seed: int = 0,
    best: Best = "min",
    metric: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    plot: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Learned:
    """Find the coefficients of a soup on held-out data by a metric that needs no gradient.

    Args:
        paths: the checkpoints, as in `averaging.soups.uniform`; at least two.
        evaluate, output, best, metric, progress: as in `averaging.soups.greedy`.
        per: one coefficient per ingredient for the ``"model"``, or for each ``"layer"``, which wants many more
            evaluations.
        evaluations: at most how many soups are evaluated, the uniform one and the single ingredients included.
        seed: of the search, which is the same each time.
        cache: as in `averaging.soups.greedy`. A search that was interrupted, or is repeated with more evaluations,
            comes to the same candidates again, and finds their results there.
        plot: a ``.png``, ``.pdf`` or ``.svg`` file for a picture of the coefficients (needs matplotlib).

    The other arguments are as in `averaging.soups.uniform`.

    Raises:
        ValueError: the package ``cma`` is not installed; settings that make no sense; and what `averaging.soups.greedy`
            raises.
        FileExistsError: an output exists and ``force`` is off.
    """
    try:
        import cma
    except ImportError as error:
        raise ValueError("the search needs the package cma: pip install 'averaging[search]'") from error
    import numpy

    check_best(best)
    models = opened(paths)
    space = Space(models, output, per, "search", options)
    plots.check_plot(plot, output, options.get("force", False))
    if evaluations < len(models) + 1:
        raise ValueError(
            f"evaluations={evaluations!r}: the uniform soup and the single ingredients alone are {len(models) + 1}"
        )
    sign = 1 if best == "min" else -1
    tried: list[Candidate] = []
    with evaluating(evaluate, output, metric, cache) as measure:

        def value(name: str, rows: Rows) -> float:
            if progress is not None:
                progress(len(tried), evaluations, name)
            tried.append(Candidate(name, rows, measure(lambda **place: space.make(rows, **place), name)))
            return sign * tried[-1].metric

        for name, rows in space.starts():
            value(name, rows)
        # Its own generator: the one of NumPy is left alone.
        normal = numpy.random.default_rng(seed).standard_normal
        settings = {"randn": lambda *shape: normal(shape), "seed": math.nan, "verbose": -10}
        strategy = cma.CMAEvolutionStrategy([0.0] * (len(space.groups) * len(models)), 1.0, settings)
        while len(tried) < evaluations and not strategy.stop():
            asked: list[Any] = strategy.ask()[: evaluations - len(tried)]
            values = []
            for point in asked:
                rows = [softmax(row) for row in point.reshape(len(space.groups), -1).tolist()]
                shares = ", ".join(f"{c:.4f}" for c in rows[0])
                about = f" ({shares})" if list(space.groups) == [ALL] else ""
                values.append(value(f"candidate {len(tried) + 1}{about}", rows))
            if len(asked) == strategy.popsize:
                strategy.tell(asked, values)
    return space.finish(tried, sign, plot, {"best": best, "per": per, "seed": seed, "evaluations": evaluations})
