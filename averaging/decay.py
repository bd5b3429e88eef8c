"""Weights of checkpoints that stand in for a decay of the learning rate.

    Σ cⱼ θⱼ   with   cⱼ = s(j/k) − s((j+1)/k),   j = 0 … k−1,   θ₀ the oldest of k checkpoints

At a constant rate θⱼ is θ₀ minus the steps taken since, so that the sum takes the steps between θⱼ₋₁ and θⱼ with the
weight cⱼ + … + cₖ₋₁ = s(j/k): what the run would be had its rate fallen along s, from s(0) = 1 to s(1) = 0.

Tian et al. 2025, "WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging for LLM Pre-training"
(arXiv:2507.17634), section 3.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

Decay = Literal["linear", "cosine", "inverse_sqrt"]

_RATE = {
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "inverse_sqrt": lambda x: 1 - math.sqrt(x),
}


def decay_weights(decay: Decay, k: int) -> list[float]:
    """The weights of ``k`` checkpoints at even distances, oldest first; they sum to one.

    Args:
        decay: how the rate falls: ``"linear"``, s(x) = 1 − x, which makes all weights the same;
            ``"cosine"``, s(x) = (1 + cos πx) / 2, heaviest in the middle;
            ``"inverse_sqrt"``, s(x) = 1 − √x, heaviest at the oldest.
        k: how many checkpoints.

    Raises:
        ValueError: another decay.
    """
    check_decay(decay)
    if decay == "linear":
        return [1 / k] * k
    rates = [_RATE[decay](j / k) for j in range(k)] + [0.0]
    return [rates[j] - rates[j + 1] for j in range(k)]


def check_decay(decay: str) -> None:
    """Raise ValueError unless ``decay`` is one of those known."""
    if decay not in get_args(Decay):
        raise ValueError(f"weights={decay!r}: give one of {', '.join(map(repr, get_args(Decay)))}")
