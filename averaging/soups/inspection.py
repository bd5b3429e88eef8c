"""What ingredients have in common: norms, cosines between task vectors, distances to the mean, byte-identical ones.

    τᵢ = θᵢ − θ_init,  cos(τᵢ, τⱼ) = ⟨τᵢ, τⱼ⟩ / (‖τᵢ‖ ‖τⱼ‖),  distance to the mean ‖θᵢ − Σ θⱼ / N‖

for the whole model and for each group of layers, from one pass over the checkpoints, in float64.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from averaging.soups.evaluation import fingerprint
from averaging.soups.output import check_alike
from averaging.soups.soup import PathLike, Paths, initial, narrowed, opened

if TYPE_CHECKING:
    from averaging.soups.engine import Progress

ALL = "all"


@dataclass(frozen=True)
class Figures:
    """The figures of one group of tensors; one entry per ingredient.

    ``tasks`` are the norms of the task vectors and ``cosines`` their matrix; both are empty without an initial model.
    A cosine with a task vector of zero is NaN.
    """

    norms: list[float]
    distances: list[float]
    tasks: list[float]
    cosines: list[list[float]]


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect`.

    Attributes:
        paths: the ingredients.
        groups: the figures by group of layers; ``"all"`` are those of the whole model.
        identical: sets of checkpoints, the initial one included, whose tensors are the same byte for byte.
    """

    paths: list[str]
    groups: dict[str, Figures]
    identical: list[list[str]]

    def __str__(self) -> str:
        lines = [f"{i}: {path}" for i, path in enumerate(self.paths, start=1)]
        for group, figures in self.groups.items():
            lines += ["", group]
            for i in range(len(self.paths)):
                line = f"  {i + 1}: norm {figures.norms[i]:.6g}, to the mean {figures.distances[i]:.4g}"
                if figures.tasks:
                    cosines = " ".join(f"{c:6.3f}" for c in figures.cosines[i])
                    line += f", task vector {figures.tasks[i]:.4g}, cosines {cosines}"
                lines.append(line)
        lines += [f"byte-identical: {', '.join(paths)}" for paths in self.identical]
        return "\n".join(lines)


def inspect(
    paths: Paths,
    init: PathLike | None = None,
    *,
    only: str | None = None,
    skip: str | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Measure checkpoints before they are mixed; with bounded memory.

    Args:
        paths: the checkpoints, as in `averaging.soups.uniform`.
        init: the model they were fine-tuned from, for task vectors and their cosines.
        only, skip: which tensors, as in `averaging.soups.uniform`.
        progress: called from time to time with the bytes read and the bytes to read.

    Raises:
        ValueError: checkpoints that are corrupt, do not belong together, or hold NaN or infinity.
        FileNotFoundError: a path does not exist or holds no checkpoints.
    """
    models = opened(paths)
    everything = models if init is None else [initial(init, models), *models]
    everything = [narrowed(checkpoint, only, skip) for checkpoint in everything]
    check_alike(everything)
    from averaging.soups.engine import Gram

    sums: dict[str, list[list[float]]] = {}
    for name, products in Gram(everything, progress).measure().items():
        for group in (ALL, layer_of(name)):
            known = sums.setdefault(group, [[0.0] * len(everything) for _ in everything])
            sums[group] = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(known, products, strict=True)]
    first = 0 if init is None else 1
    same: dict[str, list[str]] = {}
    for i, checkpoint in enumerate(everything):
        # What is far from all others is no twin, and need not be read again.
        if ALL not in sums or any(_near(sums[ALL], i, j) for j in range(len(everything)) if j != i):
            same.setdefault(fingerprint(checkpoint), []).append(str(checkpoint.path))
    return Inspection(
        [str(model.path) for model in models],
        {group: _figures(products, first) for group, products in sums.items()},
        [twins for twins in same.values() if len(twins) > 1],
    )


def layer_of(name: str) -> str:
    """``model.layers.3`` of ``model.layers.3.mlp.weight``; what has no number, by its module."""
    found = re.match(r".*?\.\d+(?=\.|$)", name)
    return found[0] if found else name.rpartition(".")[0] or name


def _figures(products: Sequence[Sequence[float]], first: int) -> Figures:
    """From the inner products of x₀ and all xᵢ − x₀, where the ingredients are those from ``first`` on."""
    count = len(products)
    origin, chosen = products[0][0], range(first, count)
    apart = [[products[i][j] if i and j else 0.0 for j in range(count)] for i in range(count)]
    norms = [_root(origin + apart[i][i] + (2 * products[0][i] if i else 0.0)) for i in chosen]
    share = 1 / len(chosen)
    mean = math.fsum(apart[i][j] for i in chosen for j in chosen) * share**2
    distances = [_root(apart[i][i] - 2 * share * math.fsum(apart[i][j] for j in chosen) + mean) for i in chosen]
    if not first:
        return Figures(norms, distances, [], [])
    tasks = [_root(apart[i][i]) for i in chosen]
    cosines = [
        [apart[i][j] / (a * b) if a and b else math.nan for j, b in zip(chosen, tasks, strict=True)]
        for i, a in zip(chosen, tasks, strict=True)
    ]
    return Figures(norms, distances, tasks, cosines)


def _near(products: Sequence[Sequence[float]], i: int, j: int) -> bool:
    """Whether xᵢ and xⱼ are the same as far as their inner products with the first tell."""
    size = sum(products[k][k] for k in (i, j) if k)
    return size - (2 * products[i][j] if i and j else 0.0) <= 1e-9 * size


def _root(square: float) -> float:
    return math.sqrt(max(square, 0.0))  # a difference may be negative by rounding
