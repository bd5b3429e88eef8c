"""Pictures of what a method explored. matplotlib comes from the extra ``plot``, imported when something is drawn."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from averaging.soups.connectivity import Connectivity
    from averaging.soups.curve import Curve
    from averaging.soups.evaluation import Best
    from averaging.soups.greedy import Tried
    from averaging.soups.sweep import Cell

KINDS = (".png", ".pdf", ".svg")
BLUE, ORANGE, RED, GREY = "#1f5fa8", "#d9730d", "#c0392b", "#8a8a8a"


def check_plot(path: str | os.PathLike[str] | None, output: str | os.PathLike[str] | None, force: bool = False) -> None:
    """Find out before any work starts whether a picture can be drawn and written to ``path``, if there is one.

    Raises:
        ValueError: matplotlib is not installed, the name is not one of a picture, or it lies in the soup's ``output``.
        FileExistsError: it exists and ``force`` is off.
    """
    if path is None:
        return
    if Path(path).suffix not in KINDS:
        raise ValueError(f"{path} is no name for a picture: it must end in {', '.join(KINDS)}")
    if Path(path).exists() and not force:
        raise FileExistsError(f"{path} exists already; pass --force (force=True) to replace it")
    if output is not None and Path(os.path.realpath(output)) in Path(os.path.realpath(path)).parents:
        raise ValueError(f"{path} lies in the output, which is replaced as a whole; draw the picture elsewhere")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError("pictures need matplotlib: pip install 'averaging[plot]'") from error


def save(figure: Figure, path: Path) -> None:
    """Write ``figure`` as what the name's suffix says."""
    figure.savefig(path, dpi=120)


def greedy_path(tried: Sequence[Tried], uniform: float, best: Best, metric: str) -> Figure:
    """The soup's metric against the ingredients tried, best first: those kept, those not, and the lines to beat."""
    figure = _figure(max(6.4, 3 + 0.3 * len(tried)), 4.2)
    axes = figure.add_subplot()
    places = range(1, len(tried) + 1)
    soup, so_far = tried[0].metric, []
    for one in tried:
        soup = one.soup if one.kept and one.soup is not None else soup
        so_far.append(soup)
    axes.axhline(tried[0].metric, color=GREY, linestyle="--", linewidth=1, label=f"best single: {tried[0].metric:.5g}")
    axes.axhline(uniform, color=ORANGE, linestyle=":", linewidth=1.5, label=f"uniform soup of all: {uniform:.5g}")
    axes.plot(places, [one.metric for one in tried], "o", color=GREY, markersize=4, alpha=0.6, label="each alone")
    axes.plot(places, so_far, color=BLUE, drawstyle="steps-post", linewidth=1.5, label=f"greedy soup: {soup:.5g}")
    for kept, marker, colour, label in ((True, "o", BLUE, "kept"), (False, "x", RED, "tried and rejected")):
        shown = [(n, one.soup) for n, one in zip(places, tried, strict=True) if one.kept is kept]
        if shown:
            axes.plot(*zip(*shown, strict=True), marker, color=colour, markersize=8, label=label, linestyle="none")
    axes.set_xticks(_few(places), map(str, _few(places)))
    axes.set_xlabel("ingredients tried, best first")
    axes.set_ylabel(_better(metric, best))
    axes.set_title(f"greedy soup: {sum(one.kept for one in tried)} of {len(tried)} ingredients kept")
    _legend(axes)
    return figure


def coefficients(by_group: Mapping[str, Sequence[float]], paths: Sequence[str], title: str) -> Figure:
    """What each ingredient is multiplied by: bars, or a heat map with a line for each group of layers."""
    names = [Path(path).name for path in paths]
    rows = list(by_group.values())
    if len(rows) == 1:
        figure = _figure(7, 1.6 + 0.35 * len(names))
        axes = figure.add_subplot()
        bars = axes.barh(range(len(names)), rows[0], color=BLUE, height=0.7)
        axes.bar_label(bars, [f"{c:.3f}" for c in rows[0]], padding=4)
        axes.axvline(1 / len(names), color=ORANGE, linestyle=":", label="uniform")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_xlabel("coefficient")
        _legend(axes)
    else:
        from matplotlib.colors import TwoSlopeNorm

        figure = _figure(min(16, 5 + 0.7 * len(names)), min(14, 2.8 + 0.28 * len(rows)))
        axes = figure.add_subplot()
        middle, everything = 1 / len(names), [c for row in rows for c in row]
        least, most = min(*everything, middle - 0.01), max(*everything, middle + 0.01)
        norm = TwoSlopeNorm(middle, least, most)
        image = axes.imshow(rows, cmap="PuOr_r", norm=norm, aspect="auto", interpolation="nearest")
        shown = _few(range(len(rows)), 40)
        axes.set_yticks(shown, [list(by_group)[i] for i in shown])
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set_xlabel("ingredient")
        axes.set_ylabel("layer")
        ticks = [least, (least + middle) / 2, middle, (middle + most) / 2, most]
        bar = figure.colorbar(image, label="coefficient", ticks=ticks)
        bar.ax.set_yticklabels([f"{tick:.2f}" + (" uniform" if tick == middle else "") for tick in ticks])
    axes.set_title(title)
    return figure


def lines(result: Connectivity) -> Figure:
    """The metric along the lines between ingredients, and to their soup; the highest barriers marked and measured."""
    kinds = [
        ("between ingredients", [line for line in result.lines if "soup" not in line.ends]),
        ("to their uniform soup", [line for line in result.lines if "soup" in line.ends]),
    ]
    kinds = [(name, some) for name, some in kinds if some]
    figure = _figure(2 + 6 * len(kinds), 4.4)
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, (name, some) in zip(panels, kinds, strict=True):
        ordered = sorted(some, key=lambda line: -line.barrier)
        for number, line in enumerate(ordered):
            verdict = "" if line.connected else ", not connected"
            label = f"{line.ends[0]} to {line.ends[1]}: barrier {line.barrier:.3g}{verdict}" if number < 12 else None
            style = "-" if line.connected else "--"
            axes.plot(
                line.alphas, line.metrics, style, marker="o", markersize=3.5, color=f"C{number % 10}", label=label
            )
        worst = ordered[0]
        if worst.barrier:
            foot = (1 - worst.at) * worst.metrics[0] + worst.at * worst.metrics[-1]
            peak = worst.metrics[worst.alphas.index(worst.at)]
            axes.plot([0, 1], [worst.metrics[0], worst.metrics[-1]], ":", color=GREY, linewidth=1)
            axes.annotate("", (worst.at, peak), (worst.at, foot), arrowprops={"arrowstyle": "<->", "color": RED})
            near = {"textcoords": "offset points", "xytext": (5, 0), "color": RED, "va": "center"}
            axes.annotate(f"{worst.barrier:.3g}", (worst.at, (peak + foot) / 2), **near)
        axes.set_xlabel("α, from the first end (0) to the second (1)")
        axes.set_title(f"lines {name}")
        _legend(axes)
    panels[0].set_ylabel(_better(result.metric, result.best))
    return figure


def heat_map(cells: Sequence[Cell], won: Cell, best: Best, metric: str) -> Figure:
    """The metric of a sweep: steps from left to right, settings from bottom to top, the best one framed."""
    from matplotlib.patches import Rectangle

    steps = sorted({cell.step for cell in cells})
    settings = list(dict.fromkeys(cell.label for cell in cells))
    values = [[math.nan] * len(steps) for _ in settings]
    for cell in cells:
        values[settings.index(cell.label)][steps.index(cell.step)] = cell.metric
    figure = _figure(min(16, 4 + 0.5 * len(steps)), min(10, 1.8 + 0.4 * len(settings)))
    axes = figure.add_subplot()
    colours = "viridis" if best == "max" else "viridis_r"
    image = axes.imshow(values, cmap=colours, aspect="auto", origin="lower", interpolation="nearest")
    corner = steps.index(won.step) - 0.5, settings.index(won.label) - 0.5
    axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=RED, linewidth=2.5, clip_on=False, zorder=3))
    shown = _few(range(len(steps)))
    axes.set_xticks(shown, [str(steps[i]) for i in shown], rotation=45)
    axes.set_yticks(range(len(settings)), settings)
    axes.set_xlabel("optimizer step of the newest checkpoint")
    axes.set_title(f"best: {won.metric:.6g}, {won.label} at step {won.step}")
    figure.colorbar(image, label=_better(metric, best))
    return figure


def curve(result: Curve, best: Best) -> Figure:
    """One metric against the coefficient; of several, each further one against the first, annotated with it."""
    first, *others = result.points[0].metrics
    names = {name: _better(name, best) if name == result.metric else name for name in (first, *others)}
    figure = _figure(5.8 * max(1, len(others)) + 2.2, 4.4)
    panels = figure.subplots(1, max(1, len(others)), squeeze=False)[0]
    if not others:
        _along(panels[0], result, [point.value for point in result.points], first)
        panels[0].set(xlabel=result.coefficient, ylabel=names[first])
    for axes, other in zip(panels, others, strict=False):
        across = [point.metrics[first] for point in result.points]
        _along(axes, result, across, other)
        for number in _few(range(len(across))):
            label = f"{result.points[number].value:g}"
            where = across[number], result.points[number].metrics[other]
            axes.annotate(label, where, xytext=(5, 5), textcoords="offset points", fontsize=8)
        axes.set(xlabel=names[first], ylabel=names[other])
    panels[0].set_title(f"{result.method}, by {result.coefficient}")
    for axes in panels:
        _legend(axes)
    return figure


def _along(axes: Axes, result: Curve, across: Sequence[float], metric: str) -> None:
    """The soups, the two ends and the straight line between them, and the best."""
    up = [point.metrics[metric] for point in result.points]
    ends = [across[0], across[-1]], [up[0], up[-1]]
    first, last = (f"{result.coefficient} {result.points[i].value:g}" for i in (0, -1))
    axes.plot(*ends, "--", color=GREY, linewidth=1, label="straight between the ends")
    axes.plot(across, up, "o-", color=BLUE, markersize=4, linewidth=1.5, label="soups")
    axes.plot(across[0], up[0], "s", color=GREY, markersize=8, label=f"{first}: {up[0]:.5g}")
    axes.plot(across[-1], up[-1], "s", color=ORANGE, markersize=8, label=f"{last}: {up[-1]:.5g}")
    if result.best is not None:
        number = result.points.index(result.best)
        label = f"best, {result.coefficient} {result.best.value:g}: {up[number]:.5g}"
        axes.plot(across[number], up[number], "o", markersize=11, fillstyle="none", color=RED, label=label)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _few(places: Iterable[int], most: int = 12) -> list[int]:
    """At most about ``most`` of ``places``, so that their labels do not run into each other."""
    places = list(places)
    return places[:: max(1, math.ceil(len(places) / most))]


def _better(metric: str, best: Best) -> str:
    return f"{metric} ({'lower' if best == 'min' else 'higher'} is better)"


def _legend(axes: Axes) -> None:
    """Beside the axes, where it hides nothing."""
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
