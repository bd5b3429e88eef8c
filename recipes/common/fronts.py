"""Curves of reward against KL divergence: read at equal KL, in tables and in a picture."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from common import report

Points = list[dict[str, Any]]
"""Of one run: dictionaries of curve, "at" (optimizer step, or η on a line), kl, proxy and gold."""

KLS = (2, 4, 6, 8, 10, 15, 20, 30)
LINES = ("optimum", "fixed reference, LITI", "EMA anchor, LITI", "WARP, round 1", "WARP, round 2")
"""Curves of which one run has all points; of the others the ends of runs with different β are the points."""


def by_curve(cells: dict[str, Points]) -> dict[str, dict[str, list[Points]]]:
    """Curve → β → the points of each seed."""
    curves: dict[str, dict[str, list[Points]]] = {}
    for key, points in cells.items():
        for curve in dict.fromkeys(point["curve"] for point in points):
            path = [point for point in points if point["curve"] == curve]
            curves.setdefault(curve, {}).setdefault(key.split()[1], []).append(path)
    return curves


def crossing(path: Points, kl: float, value: str) -> float | None:
    """``value`` where a path first reaches ``kl``, on a straight line between its points; None if it does not."""
    for one, two in pairwise(path):
        if one["kl"] <= kl < two["kl"]:
            share = (kl - one["kl"]) / (two["kl"] - one["kl"])
            return (1 - share) * one[value] + share * two[value]
    return None


def front(curve: str, strengths: dict[str, list[Points]]) -> list[list[Points]]:
    """What is read at equal KL, a path for each seed: one for each β, or one through the ends of all runs."""
    if curve in LINES:
        return list(strengths.values())
    ends = ([path[-1] for path in paths] for paths in zip(*strengths.values(), strict=True))
    return [[sorted(points, key=lambda point: point["kl"]) for points in ends]]


def at_kl(curve: str, strengths: dict[str, list[Points]], kl: float, value: str) -> list[float] | None:
    """A value of each seed at ``kl``, with the best β where there is a choice; None if not all seeds have one."""
    if curve not in LINES and len(strengths) < 3:
        return None  # a straight line between two ends says little of a curve
    golds = {}
    for number, paths in enumerate(fronts := front(curve, strengths)):
        found = [gold for path in paths if (gold := crossing(path, kl, "gold")) is not None]
        if len(found) == len(paths):
            golds[number] = mean(found)
    if not golds:
        return None
    return [crossing(path, kl, value) for path in fronts[max(golds, key=golds.__getitem__)]]


def beyond(paths: list[Points], base: list[Points], value: str) -> list[float] | None:
    """How much more the ends of runs have of a value than other paths at the same KL, seed by seed."""
    others = [crossing(line, path[-1]["kl"], value) for path, line in zip(paths, base, strict=True)]
    if None in others:
        return None
    return [path[-1][value] - other for path, other in zip(paths, others, strict=True)]


def spread(values: list[float] | None) -> str:
    if values is None:
        return ""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def tables(curves: dict[str, dict[str, list[Points]]], beside: str) -> None:
    """Print where runs end, both rewards at equal KL, and the gold reward's distance from that of curve ``beside``."""
    rows = []
    for curve, strengths in curves.items():
        if not curve.endswith("LITI"):  # those end where the others do
            for beta, paths in sorted(strengths.items(), key=lambda item: float(item[0])):
                ends = [[path[-1][value] for path in paths] for value in ("kl", "proxy", "gold")]
                more = [beyond(paths, front(beside, curves[beside])[0], value) for value in ("proxy", "gold")]
                rows.append((curve, beta, *map(spread, ends + more)))
    print(f"\nAt the end of the runs; of WARP, η = 1. More than the {beside} with the same seed and KL")
    print(report.table(["", "β", "KL", "proxy reward", "gold reward", "more proxy", "more gold"], rows))
    for title, value, base in (
        ("The gold reward at equal KL", "gold", None),
        ("The proxy reward at equal KL", "proxy", None),
        (f"The gold reward at equal KL, less that of the {beside} with the same seed", "gold", beside),
    ):
        rows = []
        for curve, strengths in curves.items():
            found = [at_kl(curve, strengths, kl, value) for kl in KLS]
            if base:
                others = [at_kl(base, curves[base], kl, value) for kl in KLS]
                found = [
                    [a - b for a, b in zip(one, other, strict=True)] if one and other else None
                    for one, other in zip(found, others, strict=True)
                ]
            rows.append((curve, *map(spread, found)))
        print(f"\n{title}")
        print(report.table(["KL", *map(str, KLS)], rows))


def plot(curves: dict[str, dict[str, list[Points]]], file: Path) -> None:
    """Both rewards against KL, means over seeds; dots are what is compared, thin lines the runs that led there."""
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    for axis, value in zip(axes, ("gold", "proxy"), strict=True):
        for number, (curve, strengths) in enumerate(curves.items()):
            colour = f"C{number - 1}" if number else "black"
            for paths in strengths.values() if curve not in LINES else ():
                axis.plot(*middle(paths, value), color=colour, linewidth=0.6, alpha=0.4)
            for i, paths in enumerate(front(curve, strengths)):
                style = {"color": colour, "linewidth": 1.6, "markersize": 4, "marker": "o", "alpha": 0.8}
                axis.plot(*middle(paths, value), **style, label=None if i else curve)
        axis.set(xlabel="KL to the initial policy, nats per answer", ylabel=f"{value} reward", xlim=(0, 40))
        axis.grid(alpha=0.25)
    axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)
    print(f"\nplot: {file}")


def middle(paths: list[Points], value: str) -> list[list[float]]:
    """KL and a value along a path, means over seeds."""
    steps = list(zip(*paths, strict=True))
    return [[mean(point[name] for point in points) for points in steps] for name in ("kl", value)]
