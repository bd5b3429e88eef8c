"""Schedule-free optimizers have one set of weights in the model while they train and another while it is evaluated.

Their `train()` and `eval()` turn one into the other, in place, and do nothing the second time (Defazio et al. 2024,
"The Road Less Scheduled", https://arxiv.org/abs/2405.15682). Called while the model holds an average, they would spoil
it, and then, by what is brought back, the weights being trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from averaging.shards import local, reshard


def enter_eval(optimizer: Any) -> None:
    """Let a schedule-free optimizer put its weights into the model before they are set aside, not after."""
    if callable(enter := getattr(optimizer, "eval", None)):
        enter()


@contextmanager
def evaluating(model: nn.Module, optimizers: Iterable[Any]) -> Iterator[None]:
    """Let ``model`` hold what schedule-free ``optimizers`` evaluate; afterwards all is as it was, bit for bit."""
    kept = []
    for optimizer in optimizers:
        if callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None)):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            weights = [local(parameter).detach().to("cpu", copy=True) for parameter in parameters]
            kept.append((optimizer, _trains(optimizer), parameters, weights))
            optimizer.eval()
    try:
        yield
    finally:
        for optimizer, trained, parameters, weights in kept:
            reshard(model)  # or it would go on with what an evaluation has gathered
            optimizer.train() if trained else optimizer.eval()
            torch._foreach_copy_([local(parameter).detach() for parameter in parameters], weights)


def _trains(optimizer: Any) -> bool:
    # A group's in optimizers, the object's own where it wraps another one.
    return bool(getattr(optimizer, "train_mode", optimizer.param_groups[0].get("train_mode")))
