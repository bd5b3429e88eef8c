"""The command line, the table and the picture of a recipe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

COLOURS = {"online": "#9aa0a6", "LAWA": "#0b6e99", "EMA": "#d9730d"}


class Panel(NamedTuple):
    """Curves against optimizer steps."""

    title: str
    ylabel: str
    steps: Sequence[float]
    curves: Mapping[str, Sequence[float]]


def arguments(description: str | None, **defaults: int) -> tuple[Any, ...]:
    """The value of each option in ``defaults`` from the command line, and the folder to write to, which is made."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{name} (default {default})")
    out = Path("runs") / Path(sys.argv[0]).stem
    options = parser.parse_args()
    out.mkdir(parents=True, exist_ok=True)
    return *vars(options).values(), out


def table(header: Sequence[str], rows: Sequence[Sequence[str | float]]) -> str:
    """Rows in columns; numbers with four decimals."""
    cells = [[f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in (header, *rows)]
    first, *others = (max(len(row[column]) for row in cells) for column in range(len(header)))
    lines = [
        row[0].ljust(first) + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], others, strict=True))
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def plot(file: Path, *panels: Panel) -> None:
    """Draw ``panels`` side by side into a PNG, and say where it is."""
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        for name, values in panel.curves.items():
            axis.plot(panel.steps, values, label=name, color=COLOURS.get(name), linewidth=1.8)
        axis.set(title=panel.title, xlabel="optimizer steps", ylabel=panel.ylabel)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False)
    figure.savefig(file, dpi=150)
    print(f"plot: {file}")
