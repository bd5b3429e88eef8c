"""How a loss changes with each ingredient's share, streamed from the disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from averaging import kernels
from averaging.soups import engine

if TYPE_CHECKING:
    from torch import Tensor

    from averaging.checkpoints import Checkpoint


class Slopes(engine._Pass):
    """Measures ⟨∂L/∂θ, xᵢ⟩ of every tensor, in float64.

    Args:
        ingredients: checkpoints with the same names, shapes and dtypes.
        gradients: name → ∂L/∂θ, flat and in CPU memory; other tensors are not read.
    """

    def __init__(self, ingredients: Sequence[Checkpoint], gradients: Mapping[str, Tensor]) -> None:
        super().__init__(ingredients)
        self.gradients = gradients
        self.slopes: dict[str, list[float]] = {}
        self._parts: dict[str, Tensor] = {}

    def measure(self) -> dict[str, list[float]]:
        """Name → one per ingredient, whatever the number of threads; raises as `run` does."""
        for _ in self.run([list(self.gradients)]):
            pass
        return self.slopes

    def _begin(self, tensor: engine._Tensor, tasks: int) -> None:
        self._parts[tensor.name] = torch.zeros(tasks, len(tensor.sources), dtype=torch.float64)

    def _task(self, tensor: engine._Tensor, start: int, stop: int, buffers: engine._Buffers) -> None:
        part = self._parts[tensor.name][start // (engine.PIECE * engine.TASK)]
        gradient = self.gradients[tensor.name]
        width = tensor.nbytes // len(gradient)  # bytes of an element; an empty tensor has no tasks
        for position in range(start, stop, engine.PIECE):
            if self._stop.is_set():
                return
            size = min(engine.PIECE, stop - position)
            direction = gradient[position // width : (position + size) // width]
            kernels.project(self._rows(tensor, position, size, buffers), direction, part)
        if not torch.isfinite(part).all():
            self._find_nonfinite(tensor, start, stop, buffers)
            raise ValueError(f"the gradient of the loss by {tensor.name!r} holds NaN or infinity, or is too large")

    def _end(self, tensor: engine._Tensor) -> None:
        self.slopes[tensor.name] = self._parts.pop(tensor.name).sum(0).tolist()
