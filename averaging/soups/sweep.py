"""Sweeps: the metric of many averages of one run's checkpoints, by what is averaged and where it ends.

    for each setting (window, spacing, decay, …), for each checkpoint as the end:  metric(average of what came before)

LAWA and EMA ask for a window or a decay before training; with the checkpoints on the disk it can be chosen afterwards,
from one run, on held-out data. Ajroldi, Orvieto and Geiping 2025, "When, Where and Why to Average Weights?"
(https://arxiv.org/abs/2502.06761), for how the best window depends on the run.
"""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from averaging.atomic import replacing
from averaging.checkpoints import Checkpoint, gather
from averaging.decay import Decay, check_decay
from averaging.soups import plots
from averaging.soups.ema import check_ema, ema_weights
from averaging.soups.evaluation import Best, Evaluate, Progress, check_best, evaluating, title
from averaging.soups.output import check_place
from averaging.soups.post_hoc import rebuilding, snapshots
from averaging.soups.soup import Options
from averaging.soups.uniform import Uniform
from averaging.text import aligned

if TYPE_CHECKING:
    from torch import Tensor

Setting = dict[str, Any]
"""Axis → value: ``{"window": 5, "spacing": 2}``."""

AXES: dict[str, type[int] | type[float] | type[str]] = {
    "window": int,
    "spacing": int,
    "decay": float,
    "weights": str,
    "post_hoc": float,
}
"""What can be swept, and the kind of its values."""


@dataclass(frozen=True)
class Cell:
    """One average: what it was made with, the step of the newest checkpoint in it, and its metric."""

    setting: Setting
    step: int
    metric: float

    @property
    def label(self) -> str:
        """For tables and messages: ``window 5, spacing 2``."""
        return label(self.setting)


@dataclass(frozen=True)
class Sweep:
    """The result of `sweep`.

    Attributes:
        cells: every average evaluated, setting by setting.
        best: the one with the best metric, the first of equals.
        weights: the best average: a `Checkpoint` if it was written, else tensors in memory.
    """

    cells: list[Cell]
    best: Cell
    weights: Mapping[str, Tensor]

    def table(self) -> str:
        """The metrics, a line per step and a column per setting; the best is marked."""
        columns = list(dict.fromkeys(cell.label for cell in self.cells))
        known = {(cell.step, cell.label): cell for cell in self.cells}
        rows = [["step", *columns]]
        for step in sorted({cell.step for cell in self.cells}):
            row = [str(step)]
            for column in columns:
                cell = known.get((step, column))
                row.append("-" if cell is None else f"{cell.metric:.6g}" + ("*" if cell is self.best else " "))
            rows.append(row)
        return "\n".join(aligned(rows, right=True))


def sweep(
    paths: Iterable[str | os.PathLike[str] | Checkpoint] | str | os.PathLike[str],
    evaluate: Evaluate,
    output: str | os.PathLike[str] | None = None,
    *,
    window: Sequence[int] = (),
    spacing: Sequence[int] = (),
    decay: Sequence[float] = (),
    weights: Sequence[Decay] = (),
    post_hoc: Sequence[float] = (),
    at: Sequence[int] | None = None,
    best: Best = "min",
    metric: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    plot: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Sweep:
    """Evaluate every combination of the settings at every checkpoint, and write the best average.

        def loss(weights):
            load_into(model, weights)  # or AutoModelForCausalLM.from_pretrained(weights.path)
            return validate(model)

        result = sweep("runs/trajectory", loss, "best", window=(1, 2, 5, 10, 20))

    Each average is the soup that `averaging.soups.uniform` makes, computed from the disk with bounded memory and
    written to a temporary folder beside the output for as long as it is evaluated.

    Args:
        paths: the checkpoints of one run, as in `averaging.soups.uniform`. With ``post_hoc``, the folder of
            `averaging.PostHocEMA`.
        evaluate: takes a `Checkpoint`, a mapping from names to tensors that are read when asked for, whose ``path``
            opens with ``from_pretrained`` where those of the checkpoints (or ``like``) do; returns the metric, or
            several by name.
        output: where the best average is written, as in `averaging.soups.uniform`. Beside it come the metrics as
            ``NAME.sweep.csv``. ``None``: nothing.
        window: how many checkpoints are averaged; all there are if not given. An end with fewer is left out.
        spacing: every how many-th checkpoint is averaged, counted back from the end.
        decay: EMA over the checkpoints with this decay per optimizer step, the first one a copy: what
            `averaging.EMA` would be had it absorbed just these.
        weights: ``"linear"``, ``"cosine"``, ``"inverse_sqrt"`` (see `averaging.decay`).
        post_hoc: relative widths of post-hoc EMAs; goes with no other setting.
        at: the steps at which the averages end; all by default.
        best: whether the lowest or the highest metric is best.
        metric, cache: as in `averaging.soups.greedy`.
        plot: a ``.png``, ``.pdf`` or ``.svg`` file for the heat map of the metric (needs matplotlib).
        progress: called before each evaluation.

    The other arguments are as in `averaging.soups.uniform`.

    Raises:
        ValueError: settings that make no sense or fit no checkpoint, steps that are unknown; ``evaluate`` raised or
            returned something that is not a finite number; and what `averaging.soups.uniform` raises. Nothing is
            written then.
        FileExistsError: an output exists and ``force`` is off.
    """
    check_best(best)
    axes = {"window": window, "spacing": spacing, "decay": decay, "weights": weights, "post_hoc": post_hoc}
    force = options.pop("force", False)
    plans = plan(paths, {axis: values for axis, values in axes.items() if values}, at, **options)
    plots.check_plot(plot, output, force)
    table = None if output is None else Path(f"{Path(output)}.sweep.csv")
    if output is not None and table is not None:
        plans[0].soup(output=output, force=force)  # complains now about what would be found wrong at the end
        check_place(output, {one.path for each in plans for one in each.ingredients})
        if table.exists() and not force:
            raise FileExistsError(f"{table} exists already; pass --force (force=True) to replace it")
    cells = []
    with evaluating(evaluate, output, metric, cache) as measure:
        for number, each in enumerate(plans):
            what = f"{label(each.setting)} at step {each.step}"
            if progress is not None:
                progress(number, len(plans), what)
            cells.append(Cell(each.setting, each.step, measure(each.soup, what)))
    choose = min if best == "min" else max
    number = choose(range(len(cells)), key=lambda number: cells[number].metric)
    won = cells[number]
    facts = {"sweep": {**won.setting, "step": won.step, "metric": won.metric}}
    with ExitStack() as stack:  # all of the outputs, or none
        if table is not None:
            _write_csv(cells, stack.enter_context(replacing(table)))
        if plot is not None:
            plots.save(plots.heat_map(cells, won, best, title(evaluate, metric)), stack.enter_context(replacing(plot)))
        return Sweep(cells, won, plans[number].soup(output=output, force=force, facts=facts).cook())


@dataclass(frozen=True)
class Plan:
    """One average that is to be evaluated.

    ``soup(output=, force=, facts=)`` makes it ready to be cooked.
    """

    setting: Setting
    step: int
    soup: Callable[..., Uniform]
    ingredients: Sequence[Checkpoint]


def plan(
    paths: Iterable[str | os.PathLike[str] | Checkpoint] | str | os.PathLike[str],
    axes: Mapping[str, Sequence[Any]],
    at: Sequence[int] | None,
    **options: Any,
) -> list[Plan]:
    """All averages of a sweep; nothing is read but headers.

    Raises:
        ValueError: see `sweep`.
    """
    _check(axes)
    settings = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    named = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if "post_hoc" in axes:
        folder = named[0]
        if len(named) > 1 or isinstance(folder, Checkpoint):
            raise ValueError("post_hoc takes a single folder, that of PostHocEMA's snapshots")
        found = snapshots(folder)
        ends = _ends(sorted({step for _, step, _ in found}), at)
        return [
            Plan(
                setting,
                step,
                partial(rebuilding, folder, setting["post_hoc"], step, **options),
                [checkpoint for checkpoint, _, _ in found],
            )
            for setting in settings
            for step in ends
        ]
    checkpoints = gather(named)
    for checkpoint in checkpoints:
        if checkpoint.step is None:
            raise ValueError(f"a sweep needs the step of each checkpoint, and that of {checkpoint.path} is not known")
    checkpoints.sort(key=lambda checkpoint: checkpoint.step or 0)
    steps = [checkpoint.step or 0 for checkpoint in checkpoints]
    ends = [steps.index(step) for step in _ends(steps, at)]
    plans = []
    for setting in settings:
        for end in ends:
            chosen = checkpoints[end :: -setting.get("spacing", 1)][: setting.get("window")][::-1]
            if len(chosen) < setting.get("window", 1):
                continue
            weights = setting.get("weights")
            if "decay" in setting:
                weights = ema_weights([checkpoint.step or 0 for checkpoint in chosen], setting["decay"])
            soup = partial(Uniform, chosen, weights=weights, method="sweep", **options)
            plans.append(Plan(setting, steps[end], soup, chosen))
    if not plans:
        raise ValueError(f"no setting fits: there are only {len(checkpoints)} checkpoints")
    return plans


def label(setting: Setting) -> str:
    """A setting in words: ``window 5, spacing 2``."""
    return ", ".join(f"{axis.replace('_', '-')} {value}" for axis, value in setting.items())


def _check(axes: Mapping[str, Sequence[Any]]) -> None:
    if not axes:
        raise ValueError(f"nothing to sweep: give values for one or more of {', '.join(AXES)}")
    for axis, values in axes.items():
        for value in values:
            if AXES[axis] is int and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{axis}={value!r}: must be a whole number of checkpoints, at least 1")
            if axis == "weights":
                check_decay(value)
            if axis == "decay":
                check_ema(value)
    for one, others in (("post_hoc", {"window", "spacing", "decay", "weights"}), ("decay", {"weights"})):
        if one in axes and (clash := others & axes.keys()):
            raise ValueError(f"{one} and {min(clash)} cannot be swept together")


def _ends(steps: Sequence[int], at: Sequence[int] | None) -> Sequence[int]:
    for step in at or ():
        if step not in steps:
            raise ValueError(f"there is no checkpoint of step {step}; the steps are {', '.join(map(str, steps))}")
    return steps if at is None else sorted(set(at))


def _write_csv(cells: Sequence[Cell], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*cells[0].setting, "step", "metric"])
        writer.writerows([*cell.setting.values(), cell.step, cell.metric] for cell in cells)
