"""Post-hoc EMA: a power-function EMA of any width, rebuilt from snapshots of a few.

The profile of a power-function EMA of exponent γ at step t is p(τ) = (γ+1) τ^γ / t^(γ+1) for τ ≤ t. The coefficients of
the snapshots are those whose combined profile is nearest to the wanted one in least squares, A x = b with

    A_ij = ⟨p_i, p_j⟩,   b_i = ⟨p_i, p⟩,
    ⟨p_a, p_b⟩ = (γ_a+1)(γ_b+1) / ((γ_a+γ_b+1) max(t_a, t_b)) · (t_a/t_b)^(γ_b if t_a < t_b else −γ_a)

divided by their sum, so that a constant stays what it is. Karras et al. 2023, "Analyzing and Improving the Training
Dynamics of Diffusion Models" (EDM2, https://arxiv.org/abs/2312.02696), section 3.2 and appendix C.3.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from averaging.checkpoints import Checkpoint
from averaging.checkpoints.finding import WIDTH_KEY
from averaging.soups.uniform import Uniform

if TYPE_CHECKING:
    from torch import Tensor

    from averaging.soups.engine import Progress

WIDEST = 12**-0.5
"""The width of γ = 0: the uniform mean of everything since the start."""


def exponent(width: float) -> float:
    """γ of the power function whose standard deviation is ``width`` times the training done.

    width² = (γ+1) / ((γ+2)² (γ+3))

    Raises:
        ValueError: a width that is not between 0 and 12^(−1/2) ≈ 0.289.
    """
    if not 0 < width < WIDEST:
        raise ValueError(f"width {width!r}: must be between 0 and {WIDEST:.3f} (the mean of everything)")
    import numpy as np

    narrow = width**-2
    return float(np.roots([1, 7, 16 - narrow, 12 - narrow]).real.max())


def coefficients(stored: Sequence[tuple[int, float]], width: float, step: int) -> list[float]:
    """What the snapshots ``stored``, as (step, width), are multiplied by to give the EMA of ``width`` at ``step``."""
    import numpy as np

    def products(t_a: Any, gamma_a: Any, t_b: Any, gamma_b: Any) -> Any:
        ratio = (t_a / t_b) ** np.where(t_a < t_b, gamma_b, -gamma_a)
        return ratio * (gamma_a + 1) * (gamma_b + 1) / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))

    steps = np.array([float(at) for at, _ in stored])
    exponents = np.array([exponent(width) for _, width in stored])
    gram = products(steps[:, None], exponents[:, None], steps, exponents)
    solution = np.linalg.solve(gram, products(steps, exponents, float(step), exponent(width)))
    return [float(x) for x in solution / solution.sum()]


def post_hoc(
    folder: str | os.PathLike[str],
    width: float,
    step: int | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    like: str | os.PathLike[str] | Checkpoint | None = None,
    dtype: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Mapping[str, Tensor]:
    """The EMA of any width at any step, from the snapshots that `averaging.PostHocEMA` stored in ``folder``.

    It is best at the steps at which snapshots were stored; between them the weights since the last one are missing.
    Memory does not grow with the number or size of the snapshots. ``output``, ``like``, ``dtype``, ``force`` and
    ``progress`` are as in `averaging.soups.uniform`; without ``like`` and a template the result is float32.

    Args:
        folder: what the averager was given.
        width: standard deviation of the profile relative to the training done, between 0 and 0.289.
        step: the optimizer step; the last stored one by default.

    Returns:
        The weights: in memory without ``output``, else as a `Checkpoint` that reads them from there.

    Raises:
        ValueError: a width out of range, a step before the first or after the last snapshot, and what `uniform` raises.
        FileNotFoundError: the folder does not exist or holds no such snapshots.
        OSError: as in `uniform`.
    """
    return rebuilding(folder, width, step, output, like=like, dtype=dtype, force=force).cook(progress)


def rebuilding(
    folder: str | os.PathLike[str],
    width: float,
    step: int | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    facts: Mapping[str, Any] | None = None,
    **options: Any,
) -> Uniform:
    """The soup that `post_hoc` cooks."""
    exponent(width)
    found = snapshots(folder)
    steps = [at for _, at, _ in found]
    step = steps[-1] if step is None else step
    if not steps[0] <= step <= steps[-1]:
        raise ValueError(f"step {step}: the snapshots in {folder} are of the steps {steps[0]} to {steps[-1]}")
    used = [snapshot for snapshot in found if snapshot[1] <= step]
    return Uniform(
        [checkpoint for checkpoint, _, _ in used],
        output,
        weights=coefficients([(at, of) for _, at, of in used], width, step),
        method="post-hoc EMA",
        facts={"width": width, "step": step, **(facts or {})},
        **options,
    )


def snapshots(folder: str | os.PathLike[str]) -> list[tuple[Checkpoint, int, float]]:
    """The snapshots of `averaging.PostHocEMA` in ``folder`` with their steps and widths, in the order of the steps.

    Raises:
        FileNotFoundError: there are none.
    """
    found = []
    for file in Path(folder).glob("step-*-width-*.safetensors"):
        checkpoint = Checkpoint(file)
        facts = checkpoint.metadata[file.name]
        if WIDTH_KEY in facts:
            found.append((checkpoint, int(facts["step"]), float(facts[WIDTH_KEY])))
    if not found:
        raise FileNotFoundError(f"{folder} holds no snapshots of PostHocEMA")
    return sorted(found, key=lambda snapshot: snapshot[1:])
