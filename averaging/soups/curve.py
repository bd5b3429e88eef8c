"""Soups along a coefficient: α of WiSE-FT, λ of task arithmetic and of rewarded soups, η of LITI and WARP.

    for each value x:  θ(x), and what it scores

With one metric the best value is found; with two, such as in-distribution against shifted data (Wortsman et al. 2022,
https://arxiv.org/abs/2109.01903, figure 1), two rewards (Ramé et al. 2023, https://arxiv.org/abs/2306.04488, figure 2)
or reward against KL (Ramé et al. 2024, https://arxiv.org/abs/2406.16768, figure 3), the curve is a front of trade-offs.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from averaging.atomic import replacing
from averaging.checkpoints import Checkpoint
from averaging.soups import plots
from averaging.soups.evaluation import Best, Evaluate, Progress, check_best, evaluating
from averaging.soups.rewarded import Rewarded
from averaging.soups.slerp import Slerp
from averaging.soups.soup import Options, PathLike, Paths, Products, Soup, cook_all, layered, opened
from averaging.soups.task import Task
from averaging.soups.warp import Warp
from averaging.soups.wise_ft import WiseFT
from averaging.text import aligned

if TYPE_CHECKING:
    from torch import Tensor

    from averaging.recipe import Layer
    from averaging.soups.engine import Progress as Bytes

METHODS: dict[str, tuple[Callable[..., Soup], str, str, tuple[str, ...]]] = {
    "wise-ft": (WiseFT, "alpha", "alpha", ("init",)),
    "task": (Task, "scale", "scale", ("init", "weights")),
    "slerp": (Slerp, "eta", "eta", ("init", "weights")),
    "warp": (Warp, "eta", "eta", ("init", "weights")),
    "rewarded": (Rewarded, "share", "lambda", ()),
}
"""The methods with a coefficient: the soup, the coefficient's argument, its name, and what else the method takes."""


@dataclass(frozen=True)
class Point:
    """A value of the coefficient, and the metrics of the soup made with it, by name."""

    value: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class Curve:
    """The result of `curve`.

    Attributes:
        method: the method's name, and ``coefficient``, that of what was varied.
        points: every soup evaluated, in the order of the values given.
        metric: the name of the metric that decides; ``None`` where there are several and none was chosen.
        best: the one with the best metric, the first of equals, if one decides.
        weights: the best soup, a `Checkpoint`, if it was written.
    """

    method: str
    coefficient: str
    points: list[Point]
    metric: str | None
    best: Point | None
    weights: Mapping[str, Tensor] | None

    def table(self) -> str:
        """The metrics, a line per value; the best is marked."""
        names = list(self.points[0].metrics)
        rows = [[self.coefficient, *names, ""]]
        for point in self.points:
            numbers = [f"{point.metrics[name]:.6g}" for name in names]
            rows.append([f"{point.value:.10g}", *numbers, "*" if point is self.best else ""])
        return "\n".join(line.rstrip() for line in aligned(rows, right=True))


def curve(
    method: str,
    paths: Paths,
    values: Sequence[float],
    evaluate: Evaluate,
    output: str | os.PathLike[str] | None = None,
    *,
    init: PathLike | None = None,
    weights: Sequence[float] | None = None,
    layers: Sequence[Layer] = (),
    best: Best = "min",
    metric: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    plot: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Curve:
    """Evaluate the soups of a method along its coefficient, write the best and draw them.

        def rewards(weights):
            load_into(policy, weights)  # or AutoModelForCausalLM.from_pretrained(weights.path)
            return {"helpful": ..., "brief": ...}

        curve("rewarded", ["helpful/", "brief/"], [0, 0.25, 0.5, 0.75, 1], rewards, best="max", plot="front.png")

    Args:
        method: ``"wise-ft"`` (of alpha), ``"task"`` (of scale), ``"slerp"`` and ``"warp"`` (of eta), or ``"rewarded"``
            (of lambda).
        paths: the ingredients, as in that method's function.
        values: those of the coefficient.
        evaluate: takes a `Checkpoint`, a mapping from names to tensors that are read when asked for, whose ``path``
            opens with ``from_pretrained`` where those of the ingredients do; returns the metric, or several by name.
        output: where the best is written, with the metrics beside it as ``NAME.curve.csv``. ``None``: nothing is.
        init, weights: as in the method's function.
        layers: where tensors have arguments of their own, as in `averaging.soups.soup.layered`.
        best: whether the lowest or the highest metric is best.
        metric: which one, if ``evaluate`` returns several; needed to write the best.
        cache: as in `averaging.soups.greedy`.
        plot: a ``.png``, ``.pdf`` or ``.svg`` file for a picture (needs matplotlib): the metric against the coefficient
            or, of several, each further one against the first, annotated with the coefficient; with both ends.
        progress: called before each evaluation with how many were done, how many there are and what is next.

    The other arguments are as in `averaging.soups.uniform`.

    Raises:
        ValueError: values that make no sense; ``evaluate`` raised or returned something that is not a finite number;
            and what the method's function raises. Nothing but the cache is written then.
        FileExistsError: an output exists and ``force`` is off.
    """
    check_best(best)
    family = Family(method, paths, values, init=init, weights=weights, layers=layers, **options)
    force = bool(options.get("force"))
    table = None if output is None else Path(f"{Path(output)}.curve.csv")
    plots.check_plot(plot, output, force)
    if output is not None and table is not None:
        family.make(family.values[0], output=output)  # complains now about what would be found wrong at the end
        if table.exists() and not force:
            raise FileExistsError(f"{table} exists already; pass --force (force=True) to replace it")
    family.measure()
    points: list[Point] = []
    with evaluating(evaluate, output, metric, cache) as measure:
        for number, value in enumerate(family.values):
            what = f"{family.coefficient} {value:.10g}"
            if progress is not None:
                progress(number, len(family.values), what)
            metrics = measure.several(partial(family.make, value), what)
            if output is not None and metric is None and len(metrics) > 1:
                raise ValueError(
                    f"the evaluation returned {', '.join(metrics)}: choose with --metric (metric=) "
                    "whose best is written, or leave out the output"
                )
            if points and metrics.keys() != points[0].metrics.keys():
                before = ", ".join(points[0].metrics)
                raise ValueError(f"the evaluation returned {', '.join(metrics)} for {what}, but {before} before")
            points.append(Point(value, metrics))
    decisive = metric or (next(iter(points[0].metrics)) if len(points[0].metrics) == 1 else None)
    choose = min if best == "min" else max
    won = None if decisive is None else choose(points, key=lambda point: point.metrics[decisive])
    result = Curve(method, family.coefficient, points, decisive, won, None)
    with ExitStack() as stack:  # all of the outputs, or none
        if plot is not None:
            plots.save(plots.curve(result, best), stack.enter_context(replacing(plot)))
        if table is None or won is None:
            return result
        _write_csv(result, stack.enter_context(replacing(table)))
        soup = family.make(won.value, output=output)
        soup.facts["curve"] = {"best": best, "metrics": won.metrics}
        return replace(result, weights=soup.cook())


def series(
    method: str,
    paths: Paths,
    values: Sequence[float],
    output: str | os.PathLike[str] | None = None,
    *,
    init: PathLike | None = None,
    weights: Sequence[float] | None = None,
    progress: Bytes | None = None,
    **options: Unpack[Options],
) -> list[Mapping[str, Tensor]]:
    """The soups of a method along its coefficient, all from one reading of the ingredients.

    Args:
        method, paths, values, init, weights: as in `curve`.
        output: a folder; the soup of ``eta`` 0.1 is written to ``eta-0.1`` in it. ``None``: nothing is written.

    ``progress``, the other arguments and what is raised are as in `averaging.soups.uniform`.

    Returns:
        The soups in the order of the values, as in `averaging.soups.uniform`.
    """
    return cook_all(Family(method, paths, values, init=init, weights=weights, **options).soups(output), progress)


class Family:
    """The soups of a method along its coefficient, whose ingredients are opened, and measured, once.

    The arguments are those of `curve`.

    Raises:
        ValueError: there are no values, some are given twice or out of range; what the method's function raises.
    """

    def __init__(
        self,
        method: str,
        paths: Paths,
        values: Sequence[float],
        *,
        init: PathLike | None = None,
        weights: Sequence[float] | None = None,
        layers: Sequence[Layer] = (),
        **options: Unpack[Options],
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method={method!r} has no coefficient to vary; one of {', '.join(METHODS)}")
        kind, self.argument, self.coefficient, takes = METHODS[method]
        own = {name: given for name, given in (("init", init), ("weights", weights)) if given is not None}
        if unfit := own.keys() - {*takes}:
            raise ValueError(f"{min(unfit)} has no meaning for {method}; leave it out")
        if "init" in takes and init is None:
            raise ValueError(f"{method} needs init, the model that the others were fine-tuned from")
        if isinstance(init, str | os.PathLike):
            own["init"] = Checkpoint(init)
        self._make, self._layers = partial(kind, opened(paths), **own, **options), layers
        self._products: Products | None = None
        self.values = [float(value) for value in values]
        if not values or len(set(map(self.folder, self.values))) < len(self.values):
            raise ValueError(f"{self.coefficient}: give some values, each once, not {self.values}")
        for value in self.values:
            self.make(value)

    def measure(self) -> None:
        """Read the ingredients for what the coefficients follow from, once for all soups to come."""
        self._products = self.make(self.values[0]).measure()

    def make(self, value: float, **place: Any) -> Soup:
        """The soup with this value; ``place`` is its output and force."""
        soup = layered(partial(self._make, **{self.argument: value}), self._layers, **place)
        soup.products = self._products
        return soup

    def soups(self, output: str | os.PathLike[str] | None) -> list[Soup]:
        """The soups of all values, each with its own folder in ``output``."""
        if output is None:
            return [self.make(value) for value in self.values]
        if Path(output).suffix == ".safetensors":
            raise ValueError(f"{output}: a range of {self.coefficient} is written to a folder; leave out the suffix")
        return [self.make(value, output=Path(output) / self.folder(value)) for value in self.values]

    def folder(self, value: float) -> str:
        """The name of the folder that the soup with this value is written to."""
        return f"{self.coefficient}-{value:.10g}"


def _write_csv(result: Curve, path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([result.coefficient, *result.points[0].metrics])
        writer.writerows([point.value, *point.metrics.values()] for point in result.points)
